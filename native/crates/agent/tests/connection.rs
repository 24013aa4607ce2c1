//! Connections: who may come in, and what ends them.

mod support;

use sandgate_frame::{Kind, VERSION};
use serde_json::json;
use support::{Agent, Client, TOKEN, eventually, exec_op};

#[test]
fn the_right_token_opens_and_three_wrong_ones_close() {
    let agent = Agent::start();
    let mut client = Client::new(agent.socket());
    for _ in 0..2 {
        client.hello("wrong");
        let frame = client.frame();
        assert_eq!((frame.kind, frame.stream), (Kind::Error, 0));
        assert_eq!(frame.json()["code"], "unauthorized");
    }
    client.hello(TOKEN);
    let hello = client.frame();
    assert_eq!((hello.kind, hello.json()["version"].as_u64()), (Kind::Hello, Some(u64::from(VERSION))));
    assert!(!hello.json()["boot_id"].as_str().unwrap().is_empty());
    let mut client = Client::new(agent.socket());
    for _ in 0..2 {
        client.hello("");
        assert_eq!(client.frame().kind, Kind::Error);
    }
    client.hello("");
    assert!(client.next().is_none(), "the third is not answered");
}

#[test]
fn nothing_works_before_the_token() {
    let agent = Agent::start();
    for kind in [Kind::Open, Kind::Ping, Kind::Data, Kind::Close] {
        let mut client = Client::new(agent.socket());
        client.send(kind, 0, if kind == Kind::Close { b"" } else { b"12345678" });
        assert!(client.next().is_none(), "{kind:?}");
    }
    let mut client = Client::new(agent.socket());
    client.raw(&[0xff; 4096]);
    assert!(client.next().is_none());
    let mut client = Client::new(agent.socket());
    client.send(Kind::Hello, 0, &[b' '; 5000]);
    assert!(client.next().is_none(), "a stranger's frame must be short");
    let mut client = Client::new(agent.socket());
    client.send(Kind::Hello, 0, b"not json");
    assert!(client.next().is_none());
    let mut client = Client::new(agent.socket());
    client.send(Kind::Hello, 0, json!({"version": 2, "token": TOKEN}).to_string().as_bytes());
    assert_eq!(client.frame().json()["code"], "unsupported");
}

#[test]
fn a_broken_frame_ends_its_connection_and_no_other() {
    let agent = Agent::start();
    let mut good = agent.client();
    let broken: [&[u8]; 5] = [
        &[0, 0, 0, 0, 99, 0, 0, 0, 1, 0, 0, 0],            // unknown type
        &[0, 0, 0, 0, 10, 0, 7, 0, 1, 0, 0, 0],            // reserved field
        &[0xff, 0xff, 0xff, 0xff, 5, 0, 0, 0, 1, 0, 0, 0], // length
        &[0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0],             // a server's frame on no stream is ignored …
        &[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'], // … an OPEN of stream 0 is not
    ];
    for (i, bytes) in broken.iter().enumerate() {
        let mut client = agent.client();
        client.raw(bytes);
        if i == 3 {
            assert_eq!(client.exec(&json!({"argv": ["true"]})).code(), 0);
        } else {
            assert!(client.next().is_none(), "{bytes:?}");
        }
    }
    let mut twice = agent.client();
    twice.send(Kind::Open, 5, exec_op(&json!({"argv": ["sleep", "9"]})).to_string().as_bytes());
    twice.send(Kind::Open, 5, exec_op(&json!({"argv": ["sleep", "9"]})).to_string().as_bytes());
    while twice.next().is_some() {}
    assert_eq!(good.exec(&json!({"argv": ["echo", "still here"]})).text(1), "still here\n");
}

#[test]
fn broken_json_ends_its_stream_only() {
    let agent = Agent::start();
    let mut client = agent.client();
    for payload in [&b"{"[..], b"[]", b"{}", b"{\"op\":7}", b"\xff\xfe", b"{\"op\":\"read\",\"path\":5}"] {
        client.send(Kind::Open, 1, payload);
        let frame = client.frame();
        assert_eq!((frame.kind, frame.stream, frame.json()["code"].as_str()), (Kind::Error, 1, Some("bad_request")));
    }
    assert_eq!(client.exec(&json!({"argv": ["true"]})).code(), 0);
}

#[test]
fn frames_for_streams_that_are_over_are_ignored() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.data(77, 0, b"late");
    client.count(Kind::Credit, 1, 77, 5);
    client.count(Kind::End, 0, 77, 5);
    client.send(Kind::Ack, 77, b"");
    client.send(Kind::Close, 77, b"");
    client.send(Kind::Control, 77, b"{}");
    client.send(Kind::Ping, 0, b"12345678");
    let frame = client.frame();
    assert_eq!((frame.kind, frame.payload.as_slice()), (Kind::Pong, &b"12345678"[..]));
}

#[test]
fn a_crowd_of_strangers_does_not_lock_the_host_out() {
    let agent = Agent::start();
    let crowd: Vec<_> = (0..200).map(|_| agent.socket()).collect();
    let mut client = agent.client();
    assert_eq!(client.exec(&json!({"argv": ["true"]})).code(), 0);
    drop(crowd);
}

#[test]
fn streams_of_one_connection_are_bounded() {
    let agent = Agent::start();
    let mut client = agent.client();
    let op = json!({"op": "attach", "id": "sleeper"});
    let sleeper = exec_op(&json!({"id": "sleeper", "argv": ["sleep", "60"], "stdin": true}));
    let stream = client.open(&sleeper);
    client.collect_until(stream, |outcome| outcome.reply.is_some());
    for _ in 1..1024 {
        let stream = client.open(&op);
        client.collect_until(stream, |outcome| outcome.reply.is_some());
    }
    let one_too_many = client.open(&op);
    assert_eq!(client.collect(one_too_many).error(), "too_many");
    client.send(Kind::Close, stream, &[]);
    let stream = client.open(&op);
    client.collect_until(stream, |outcome| outcome.reply.is_some());
}

#[test]
fn the_token_and_the_environment_can_be_replaced() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.call(&json!({"op": "identity", "env": {"NEW": "1"}, "token": "another"})).reply();
    assert_eq!(client.call(&json!({"op": "identity", "env": {"A=B": ""}})).error(), "bad_request");
    assert_eq!(client.call(&json!({"op": "identity", "token": ""})).error(), "bad_request");
    let mut stranger = Client::new(agent.socket());
    stranger.hello(TOKEN);
    assert_eq!(stranger.frame().kind, Kind::Error);
    stranger.hello("another");
    assert_eq!(stranger.frame().kind, Kind::Hello);
    assert_eq!(stranger.exec(&json!({"argv": ["printenv", "NEW"]})).text(1), "1\n");
}

#[test]
fn an_idle_agent_keeps_few_descriptors_and_threads() {
    let agent = Agent::start();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", agent.pid())).unwrap().count();
    let _connected = agent.client();
    let before = count("fd");
    for _ in 0..3 {
        let mut client = agent.client();
        let streams: Vec<u32> = (0..50).map(|_| client.open(&exec_op(&json!({"argv": ["true"]})))).collect();
        let mut exits = 0;
        while exits < streams.len() {
            exits += usize::from(client.frame().kind == Kind::Event);
        }
    }
    eventually("descriptors are closed with what they were for", || count("fd") == before);
    assert!(count("task") <= 9);
}
