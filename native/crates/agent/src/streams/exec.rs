//! A stream attached to a process: its output, its exit, its input.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Advance;
use crate::core::Core;
use crate::error::{Code, OpError, OpResult};
use crate::process::{Asked, Process, Reader, Record, Size, State, StreamKey, resize, signal, signal_from_json};
use crate::sender::Sender;
use sandgate_frame::{CHANNEL_INPUT, CHANNEL_PTY, DATA_BYTES_MAX, Kind};

pub struct ExecStream {
    pub serial: u64,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Control {
    Signal { signal: Value },
    Resize(Size),
}

impl ExecStream {
    pub fn advance(&mut self, key: StreamKey, sender: &mut Sender, core: &mut Core) -> OpResult<Advance> {
        let gone = || OpError::new(Code::NoSuchProcess, "the process has been forgotten");
        let process = core.processes.get(self.serial).ok_or_else(gone)?;
        if process.state == State::Starting {
            return Ok(Advance::Idle);
        }
        if let Some(bytes) = process.input.take_credit(key) {
            sender.credit(CHANNEL_INPUT, key.stream, bytes);
        }
        reply(process, key, sender)?;
        let again = send_output(process, key, sender);
        if again {
            return Ok(Advance::Again);
        }
        let advance = close_if_over(process, key, sender);
        if advance == Advance::Done {
            core.processes.detach(self.serial, key, &mut core.timers);
        }
        Ok(advance)
    }

    pub fn on_data(&mut self, key: StreamKey, core: &mut Core, offset: u64, bytes: &[u8]) -> OpResult<()> {
        let Some(process) = core.processes.get(self.serial) else { return Ok(()) };
        process.input.receive(key, offset, bytes).map_err(OpError::bad_request)
    }

    pub fn on_end(&mut self, core: &mut Core) {
        if let Some(process) = core.processes.get(self.serial) {
            process.input.end();
        }
    }

    pub fn on_credit(&mut self, key: StreamKey, core: &mut Core, channel: u8, bytes: u64) {
        let reader = core.processes.get(self.serial).and_then(|process| process.reader(key));
        if let Some(cursor) = reader.and_then(|reader| reader.cursors.get_mut(usize::from(channel))) {
            cursor.credit = cursor.credit.saturating_add(bytes);
            cursor.confirmed = cursor.confirmed.saturating_add(bytes).min(cursor.sent);
            core.processes.confirmed(self.serial, channel);
        }
    }

    pub fn on_control(&mut self, core: &mut Core, payload: &[u8]) -> OpResult<()> {
        let control: Control =
            serde_json::from_slice(payload).map_err(|error| OpError::bad_request(format!("control: {error}")))?;
        let Some(process) = core.processes.get(self.serial) else { return Ok(()) };
        match control {
            // A client that leaves at once kills what it has just asked for.
            Control::Signal { signal: name } if process.state == State::Starting => {
                process.early_signal = Some(signal_from_json(&name)?);
            }
            // It has just exited; the client will learn of that.
            _ if !process.is_alive() => {}
            Control::Signal { signal: name } => signal(process, signal_from_json(&name)?, true),
            Control::Resize(size) => {
                let master = process.output(CHANNEL_PTY).and_then(|output| output.fd.as_ref());
                let master = master.ok_or_else(|| OpError::bad_request("the process has no terminal"))?;
                resize(master, size).map_err(|errno| OpError::of_errno(errno, "cannot resize the terminal"))?;
            }
        }
        Ok(())
    }
}

fn reply(process: &mut Process, key: StreamKey, sender: &mut Sender) -> OpResult<()> {
    let Some(reader) = process.reader(key).filter(|reader| !reader.replied) else { return Ok(()) };
    reader.replied = true;
    let asked = reader.asked;
    let payload = match asked {
        Asked::Exec { resumed } => json!({
            "id": process.id, "pid": process.pid.map(nix::unistd::Pid::as_raw), "started_at": process.started_at,
            "resumed": resumed, "stdin_bytes": process.input.received(),
        })
        .to_string()
        .into_bytes(),
        Asked::Attach => serde_json::to_vec(&Record::of(process))
            .map_err(|error| OpError::new(Code::IoError, format!("cannot describe the process: {error}")))?,
    };
    // Most commands are over in a moment: their reply, output and exit leave together. Who will type or has started
    // something for the background wants to know at once.
    if process.background || process.input.is_open() || asked == Asked::Attach {
        sender.frame(Kind::Reply, key.stream, &payload);
    } else {
        sender.frame_lazily(Kind::Reply, key.stream, &payload);
    }
    Ok(())
}

/// Send one frame per channel; whether there is more to send.
fn send_output(process: &mut Process, key: StreamKey, sender: &mut Sender) -> bool {
    let Process { outputs, readers, .. } = process;
    let Some(Reader { cursors, .. }) = readers.iter_mut().find(|reader| reader.key == key) else { return false };
    let mut again = false;
    for output in outputs {
        let cursor = &mut cursors[usize::from(output.channel)];
        cursor.sent = cursor.sent.max(output.ring.start());
        let waiting = output.ring.end() - cursor.sent;
        let length = waiting.min(cursor.credit).min(DATA_BYTES_MAX as u64) as usize;
        if length == 0 {
            continue;
        }
        sender.data(output.channel, key.stream, cursor.sent, output.ring.slices(cursor.sent, length));
        cursor.sent += length as u64;
        cursor.credit -= length as u64;
        again |= waiting > length as u64 && cursor.credit > 0;
    }
    again
}

fn close_if_over(process: &mut Process, key: StreamKey, sender: &mut Sender) -> Advance {
    let finished = process.state == State::Finished;
    let Process { outputs, readers, exit, .. } = process;
    let Some(reader) = readers.iter_mut().find(|reader| reader.key == key) else { return Advance::Idle };
    let mut over = finished || !reader.follow;
    for output in outputs {
        let cursor = &mut reader.cursors[usize::from(output.channel)];
        let everything = cursor.sent == output.ring.end() && (output.is_over() || !reader.follow);
        if everything && !cursor.ended {
            cursor.ended = true;
            sender.end_lazily(output.channel, key.stream, cursor.sent);
        }
        over &= cursor.ended;
    }
    if !over {
        return Advance::Idle;
    }
    match exit.as_ref().filter(|_| finished) {
        // CLOSE answers the client's ACK: whoever relays the stream forgets it at a CLOSE, and the ACK has to pass.
        Some(exit) => sender.frame(Kind::Event, key.stream, exit.to_event().to_string().as_bytes()),
        None => sender.frame(Kind::Close, key.stream, &[]),
    }
    Advance::Done
}
