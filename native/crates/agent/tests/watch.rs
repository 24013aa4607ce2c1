//! Watches, ports and metrics.

mod support;

use sandgate_frame::Kind;
use serde_json::{Value, json};
use support::{Agent, Client, exec_op};

struct Watch {
    client: Client,
    stream: u32,
}

impl Watch {
    fn start(agent: &Agent, recursive: bool) -> Self {
        let mut client = agent.client();
        let stream = client.open(&json!({"op": "watch", "path": agent.path(""), "recursive": recursive}));
        client.collect_until(stream, |outcome| outcome.reply.is_some());
        Self { client, stream }
    }

    /// Events until one of `kind` on `path` comes.
    fn until(&mut self, kind: &str, path: &str) -> Vec<Value> {
        let wanted = |event: &Value| event["type"] == kind && event["path"] == path;
        self.client.collect_until(self.stream, |outcome| outcome.events.last().is_some_and(wanted)).events
    }
}

fn clean(path: &str) -> String {
    path.trim_end_matches('/').to_owned()
}

#[test]
fn changes_in_a_directory_are_told() {
    let agent = Agent::start();
    let mut watch = Watch::start(&agent, false);
    let (a, b) = (agent.path("a"), agent.path("b"));
    std::fs::write(&a, "x").unwrap();
    let events = watch.until("modified", &a);
    assert_eq!(events[0], json!({"type": "created", "path": a, "is_dir": false}));
    std::fs::rename(&a, &b).unwrap();
    let events = watch.until("renamed", &b);
    assert_eq!(events.last().unwrap()["old_path"], a);
    std::fs::remove_file(&b).unwrap();
    watch.until("deleted", &b);
    // Not recursive: what happens further down is not told.
    std::fs::create_dir(agent.path("d")).unwrap();
    watch.until("created", &agent.path("d"));
    std::fs::write(agent.path("d/deep"), "x").unwrap();
    std::fs::write(agent.path("end"), "x").unwrap();
    let events = watch.until("created", &agent.path("end"));
    assert!(!events.iter().any(|event| event["path"] == agent.path("d/deep")), "{events:?}");
}

#[test]
fn new_and_moved_directories_are_followed() {
    let agent = Agent::start();
    std::fs::create_dir_all(agent.path("old/sub")).unwrap();
    let mut watch = Watch::start(&agent, true);
    std::fs::write(agent.path("old/sub/file"), "x").unwrap();
    watch.until("created", &agent.path("old/sub/file"));
    std::fs::create_dir_all(agent.path("new/very/deep")).unwrap();
    watch.until("created", &agent.path("new/very/deep"));
    std::fs::write(agent.path("new/very/deep/file"), "x").unwrap();
    watch.until("created", &agent.path("new/very/deep/file"));
    std::fs::rename(agent.path("old"), agent.path("moved")).unwrap();
    watch.until("renamed", &agent.path("moved"));
    std::fs::write(agent.path("moved/sub/file"), "y").unwrap();
    watch.until("modified", &agent.path("moved/sub/file"));
}

#[test]
fn leaving_the_watched_tree_is_a_deletion_and_entering_it_a_creation() {
    let agent = Agent::start();
    let elsewhere = Agent::start();
    std::fs::write(agent.path("file"), "x").unwrap();
    let mut watch = Watch::start(&agent, true);
    std::fs::rename(agent.path("file"), elsewhere.path("file")).unwrap();
    watch.until("deleted", &agent.path("file"));
    std::fs::rename(elsewhere.path("file"), agent.path("back")).unwrap();
    watch.until("created", &agent.path("back"));
}

#[test]
fn ten_thousand_changes_arrive_or_an_overflow_says_that_some_did_not() {
    let agent = Agent::start();
    let mut watch = Watch::start(&agent, false);
    for i in 0..10_000 {
        std::fs::File::create(agent.path(&format!("{i}"))).unwrap();
    }
    let last = agent.path("9999");
    let outcome = watch.client.collect_until(watch.stream, |outcome| {
        outcome.events.last().is_some_and(|event| event["type"] == "overflow" || event["path"] == last)
    });
    let overflow = outcome.events.iter().any(|event| event["type"] == "overflow");
    assert!(overflow || outcome.events.len() == 10_000);
}

#[test]
fn a_missing_path_cannot_be_watched() {
    let agent = Agent::start();
    let mut client = agent.client();
    assert_eq!(client.call(&json!({"op": "watch", "path": agent.path("missing")})).error(), "not_found");
    assert_eq!(client.call(&json!({"op": "watch", "path": clean("relative/")})).error(), "invalid_path");
}

#[test]
fn listening_ports_are_found_with_their_process() {
    let agent = Agent::start();
    let mut client = agent.client();
    let server = "import socket,time\ns=socket.create_server(('127.0.0.1',0))\nprint(s.getsockname()[1],flush=True)\ntime.sleep(60)";
    let stream = client.open(&exec_op(&json!({"argv": ["python3", "-c", server]})));
    let outcome = client.collect_until(stream, |outcome| outcome.output.contains_key(&1));
    let port: u64 = outcome.text(1).trim().parse().unwrap();
    let listed = agent.client().call(&json!({"op": "ports"})).reply()["ports"].clone();
    let found = listed.as_array().unwrap().iter().find(|listed| listed["port"] == port).unwrap();
    assert_eq!((&found["address"], &found["pid"]), (&json!("127.0.0.1"), &outcome.reply()["pid"]));
    client.send(Kind::Control, stream, br#"{"type":"signal","signal":"KILL"}"#);
}

#[test]
fn the_machine_is_measured() {
    let agent = Agent::start();
    let metrics = agent.client().call(&json!({"op": "metrics"})).reply().clone();
    for name in ["cpu_seconds", "memory_used_bytes", "memory_total_bytes", "disk_total_bytes", "processes", "uptime_s"]
    {
        assert!(metrics[name].as_f64().unwrap() > 0.0, "{name} in {metrics}");
    }
}
