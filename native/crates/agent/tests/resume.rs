//! Connections come and go; bytes and statuses are neither lost nor repeated.

mod support;

use std::net::Shutdown;

use sandgate_frame::Kind;
use serde_json::json;
use support::{Agent, Client, checksum, eventually, exec_op, with};

const LINES: usize = 200_000;

fn expected() -> Vec<u8> {
    (1..=LINES).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

#[test]
fn output_survives_cuts_at_any_offset() {
    let agent = Agent::start();
    let op = exec_op(&json!({"argv": ["seq", LINES.to_string()]}));
    let expected = expected();
    let mut got: Vec<u8> = Vec::new();
    let mut cuts = 0;
    'connections: loop {
        let mut client = agent.client();
        let stream = client.open(&with(op.clone(), &json!({"offsets": {"1": got.len(), "2": 0}})));
        // Odd, growing amounts, so that the cuts fall everywhere within frames, windows and the ring.
        let stop_at = got.len() + 30_011 + cuts * 17_203;
        loop {
            let frame = client.frame();
            match frame.kind {
                Kind::Reply => assert_eq!(frame.json()["resumed"], cuts > 0),
                Kind::Data => {
                    let content = &frame.payload[8..];
                    assert_eq!(frame.count(), got.len() as u64, "the first byte after a cut is the next one");
                    let taken = content.len().min(stop_at - got.len());
                    got.extend_from_slice(&content[..taken]);
                    if got.len() == stop_at {
                        cuts += 1;
                        continue 'connections; // dropped in the middle of a frame
                    }
                    client.count(Kind::Credit, frame.channel, stream, content.len() as u64);
                }
                Kind::End if frame.channel == 1 => assert_eq!(frame.count(), expected.len() as u64),
                Kind::Event => {
                    assert_eq!(frame.json()["exit_code"], 0);
                    client.send(Kind::Ack, stream, &[]);
                }
                Kind::Close => break 'connections,
                Kind::End => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    assert!(cuts > 3);
    assert_eq!(checksum(&got), checksum(&expected));
}

#[test]
fn a_known_id_starts_nothing_twice_and_keeps_its_status_until_acknowledged() {
    let agent = Agent::start();
    let file = agent.path("count");
    let op = exec_op(&json!({"shell": format!("echo run >> {file}; echo out; exit 9")}));
    for attempt in 0..3 {
        let mut client = agent.client();
        let stream = client.open(&op);
        let outcome = client.collect_until(stream, |outcome| outcome.reply.is_some());
        assert_eq!(outcome.reply()["resumed"], attempt > 0);
    }
    let mut client = agent.client();
    let stream = client.open(&op);
    let outcome = client.collect(stream);
    assert_eq!((outcome.text(1).as_str(), outcome.code()), ("out\n", 9));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "run\n");
    // Acknowledged by `collect`: now it is forgotten, and the same id is a new process.
    assert_eq!(client.call(&json!({"op": "process", "id": op["id"]})).error(), "no_such_process");
    let stream = client.open(&op);
    let outcome = client.collect(stream);
    assert_eq!(outcome.reply()["resumed"], false);
}

#[test]
fn two_opens_of_one_id_before_it_started_share_one_process() {
    let agent = Agent::start();
    let mut client = agent.client();
    let op = exec_op(&json!({"shell": "echo $$; sleep 0.2"}));
    let (first, second) = (client.open(&op), client.open(&op));
    let mut outputs = std::collections::BTreeMap::new();
    let mut exits = 0;
    while exits < 2 {
        let frame = client.frame();
        match frame.kind {
            Kind::Data => drop(outputs.insert(frame.stream, frame.payload)),
            Kind::Event => exits += 1,
            _ => {}
        }
    }
    assert_eq!(outputs[&first], outputs[&second]);
}

#[test]
fn input_is_taken_once_however_often_it_is_sent() {
    let agent = Agent::start();
    let op = exec_op(&json!({"argv": ["cat"], "stdin": true}));
    let mut client = agent.client();
    let stream = client.open(&op);
    client.data(stream, 0, b"abc");
    client.collect_until(stream, |outcome| outcome.output.get(&1).is_some_and(|output| output.len() == 3));
    drop(client);
    let mut client = agent.client();
    let stream = client.open(&with(op, &json!({"offsets": {"1": 3}})));
    let outcome = client.collect_until(stream, |outcome| outcome.reply.is_some());
    assert_eq!(outcome.reply()["stdin_bytes"], 3);
    client.data(stream, 0, b"abcdef");
    client.count(Kind::End, 0, stream, 6);
    assert_eq!(client.collect(stream).text(1), "def");
}

#[test]
fn a_foreground_process_waits_for_its_reader() {
    let agent = Agent::start();
    let op = exec_op(&json!({"argv": ["seq", LINES.to_string()], "log_bytes_max": 10_000}));
    let mut client = agent.client();
    let stream = client.open(&op);
    client.collect_until(stream, |outcome| outcome.reply.is_some());
    drop(client);
    let mut client = agent.client();
    let state = |client: &mut Client| client.call(&json!({"op": "process", "id": op["id"]})).reply().clone();
    eventually("the buffer is full", || state(&mut client)["stdout_bytes"] == 10_000);
    assert_eq!(state(&mut client)["state"], "running");
    let stream = client.open(&op);
    assert_eq!(checksum(&client.collect(stream).output[&1]), checksum(&expected()));
}

#[test]
fn a_background_process_overwrites_its_oldest_output() {
    let agent = Agent::start();
    let op = json!({"argv": ["seq", LINES.to_string()], "background": true, "log_bytes_max": 1000});
    let op = exec_op(&op);
    let mut client = agent.client();
    let stream = client.open(&op);
    client.collect_until(stream, |outcome| outcome.reply.is_some());
    client.send(Kind::Close, stream, &[]);
    let mut other = agent.client();
    let expected = expected();
    eventually("it runs to its end without a reader", || {
        other.call(&json!({"op": "process", "id": op["id"]})).reply()["state"] == "exited"
    });
    let all = other.call(&json!({"op": "attach", "id": op["id"], "follow": false}));
    assert_eq!(all.output[&1], expected[expected.len() - 1000..]);
    assert_eq!((all.ends[&1], all.code()), (expected.len() as u64, 0));
    let tail = other.call(&json!({"op": "attach", "id": op["id"], "tail_bytes": 7}));
    assert_eq!(tail.text(1), "200000\n");
    let beyond = other.call(&json!({"op": "attach", "id": op["id"], "offsets": {"1": 1_u64 << 40}}));
    assert_eq!(beyond.error(), "bad_request");
}

#[test]
fn attaching_without_following_ends_at_once() {
    let agent = Agent::start();
    let mut client = agent.client();
    let op = exec_op(&json!({"shell": "echo here; sleep 60", "background": true}));
    let stream = client.open(&op);
    client.collect_until(stream, |outcome| outcome.output.contains_key(&1));
    let mut other = agent.client();
    let snapshot = other.call(&json!({"op": "attach", "id": op["id"], "follow": false}));
    assert_eq!((snapshot.text(1).as_str(), snapshot.ends[&1], snapshot.events.len()), ("here\n", 5, 0));
    assert_eq!(snapshot.reply()["state"], "running");
}

#[test]
fn a_stream_without_credit_stops_and_holds_up_no_other() {
    let agent = Agent::start();
    let mut client = agent.client();
    let slow = client.open(&exec_op(&json!({"argv": ["head", "-c", "4000000", "/dev/zero"]})));
    let mut received = 0;
    while received < 1024 * 1024 {
        let frame = client.frame();
        if frame.kind == Kind::Data {
            received += frame.payload.len() - 8;
        }
    }
    assert_eq!(received, 1024 * 1024);
    assert_eq!(client.exec(&json!({"argv": ["echo", "quick"]})).text(1), "quick\n");
    client.count(Kind::Credit, 1, slow, received as u64);
    let rest = client.collect(slow);
    assert_eq!((received + rest.output[&1].len(), rest.code()), (4_000_000, 0));
}

#[test]
fn sixty_four_mebibytes_arrive_as_they_were_sent() {
    const BYTES: usize = 64 * 1024 * 1024;
    let agent = Agent::start();
    let file = agent.path("content");
    let content: Vec<u8> = (0..BYTES as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(&file, &content).unwrap();
    let mut client = agent.client();
    let by_process = client.exec(&json!({"argv": ["cat", file]}));
    assert_eq!(checksum(&by_process.output[&1]), checksum(&content));
    let by_read = client.call(&json!({"op": "read", "path": file}));
    assert_eq!(checksum(&by_read.output[&1]), checksum(&content));
}

#[test]
fn the_status_of_a_process_whose_connection_was_shut_is_kept() {
    let agent = Agent::start();
    let op = exec_op(&json!({"shell": "sleep 0.2; exit 42"}));
    let socket = agent.socket();
    let mut client = Client::new(socket.try_clone().unwrap());
    client.hello(support::TOKEN);
    let stream = client.open(&op);
    assert_eq!(client.frame().kind, Kind::Hello);
    client.collect_until(stream, |outcome| outcome.reply.is_some());
    socket.shutdown(Shutdown::Both).unwrap();
    let mut client = agent.client();
    let stream = client.open(&op);
    assert_eq!(client.collect(stream).code(), 42);
}
