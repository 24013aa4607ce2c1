//! Terminals: they are ones, have a size, and control characters work.

mod support;

use sandgate_frame::Kind;
use serde_json::json;
use support::{Agent, exec_op};

#[test]
fn a_terminal_is_one_and_has_its_size() {
    let agent = Agent::start();
    let mut client = agent.client();
    let outcome = client.exec(&json!({"shell": "tty; stty size; echo $TERM", "pty": {"rows": 31, "cols": 97}}));
    let text = outcome.text(3);
    assert!(text.starts_with("/dev/pts/"), "{text:?}");
    assert!(text.contains("\r\n31 97\r\nxterm-256color\r\n"), "{text:?}");
    assert_eq!(outcome.ends[&3], text.len() as u64);
    assert!(!outcome.ends.contains_key(&1));
}

#[test]
fn typing_resizing_and_interrupting_work_as_in_a_window() {
    let agent = Agent::start();
    let mut client = agent.client();
    let op = json!({"argv": ["bash", "--norc", "-i"], "pty": {"rows": 24, "cols": 80}, "env": {"PS1": "ready> "}});
    let stream = client.open(&exec_op(&op));
    let mut typed = 0;
    // Type and wait until the terminal shows what is expected, in this order.
    let mut step = |client: &mut support::Client, input: &str, expected: &[&str]| {
        client.data(stream, typed, input.as_bytes());
        typed += input.len() as u64;
        client.collect_until(stream, |outcome| {
            let shown = String::from_utf8_lossy(outcome.output.get(&3).map_or(&[], Vec::as_slice)).into_owned();
            let mut rest = shown.as_str();
            expected.iter().all(|part| rest.split_once(part).map(|(_, after)| rest = after).is_some())
        });
    };
    step(&mut client, "", &["ready> "]);
    step(&mut client, "echo $((40 + 2))\n", &["42\r\n", "ready> "]);
    let resize = json!({"type": "resize", "rows": 50, "cols": 132}).to_string();
    client.send(Kind::Control, stream, resize.as_bytes());
    step(&mut client, "stty size\n", &["50 132", "ready> "]);
    // Its own output, not the line's echo, tells that the job has the foreground: what is typed before that reaches
    // a shell which still edits its line.
    step(&mut client, "(echo begun-$((1 + 1)); exec cat); echo not-reached\n", &["begun-2\r\n"]);
    // Echoed by the terminal and by `cat`.
    step(&mut client, "ping\n", &["ping\r\n", "ping\r\n"]);
    step(&mut client, "\x03", &["^C", "ready> "]);
    client.data(stream, typed, b"exit 3\n");
    assert_eq!(client.collect(stream).code(), 3);
}

#[test]
fn the_end_of_input_is_the_end_of_a_terminal_session() {
    let agent = Agent::start();
    let mut client = agent.client();
    let stream = client.open(&exec_op(&json!({"argv": ["cat"], "pty": {"rows": 24, "cols": 80}})));
    client.data(stream, 0, b"line\n");
    client.count(Kind::End, 0, stream, 5);
    let outcome = client.collect(stream);
    assert_eq!((outcome.text(3).as_str(), outcome.code()), ("line\r\nline\r\n", 0));
}

#[test]
fn only_a_terminal_can_be_resized() {
    let agent = Agent::start();
    let mut client = agent.client();
    let stream = client.open(&exec_op(&json!({"argv": ["sleep", "60"], "stdin": true})));
    client.collect_until(stream, |outcome| outcome.reply.is_some());
    let resize = json!({"type": "resize", "rows": 1, "cols": 1}).to_string();
    client.send(Kind::Control, stream, resize.as_bytes());
    assert_eq!(client.collect(stream).error(), "bad_request");
    let stream = client.open(&exec_op(&json!({"argv": ["sleep", "60"], "stdin": true})));
    client.send(Kind::Control, stream, b"{\"type\":\"dance\"}");
    assert_eq!(client.collect(stream).error(), "bad_request");
}

#[test]
fn a_signal_can_be_sent_on_the_stream() {
    let agent = Agent::start();
    let mut client = agent.client();
    let stream = client.open(&exec_op(&json!({"argv": ["sleep", "60"], "stdin": true})));
    client.collect_until(stream, |outcome| outcome.reply.is_some());
    client.send(Kind::Control, stream, br#"{"type":"signal","signal":"SIGINT"}"#);
    let outcome = client.collect(stream);
    assert_eq!((outcome.code(), &outcome.exit()["signal"]), (130, &json!("SIGINT")));
}
