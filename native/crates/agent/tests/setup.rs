//! A machine made another: identity in one frame, and the hooks of a stage.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Agent, Client, TOKEN, eventually};

fn hook(agent: &Agent, name: &str, script: &str) -> String {
    let path = agent.path(&format!("hooks.d/{name}"));
    fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn one_frame_sets_files_environment_and_token() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.call(&json!({"op": "identity", "env": {"OLD": "1"}, "unset": ["INHERITED"]})).reply();
    let (hosts, id) = (agent.path("hosts"), agent.path("machine-id"));
    fs::write(&hosts, "old").unwrap();
    fs::set_permissions(&hosts, fs::Permissions::from_mode(0o600)).unwrap();
    let op = json!({
        "op": "identity", "reset": true, "env": {"NEW": "2"}, "token": "another", "entropy": "abc",
        "files": {&hosts: "127.0.0.1 me\n", &id: "0123\n"},
    });
    for _ in 0..2 {
        assert_eq!(client.call(&op).reply(), &json!({"ran": [], "failed": []}));
    }
    assert_eq!(fs::read_to_string(&hosts).unwrap(), "127.0.0.1 me\n");
    assert_eq!(fs::metadata(&hosts).unwrap().permissions().mode() & 0o777, 0o644, "all may read them");
    assert_eq!(fs::metadata(&id).unwrap().permissions().mode() & 0o777, 0o644);
    let names: Vec<_> = fs::read_dir(agent.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "nothing is left of the writing: {names:?}");

    let env = client.exec(&json!({"argv": ["env"]})).text(1);
    assert!(env.contains("NEW=2\n") && env.contains("INHERITED=yes\n") && !env.contains("OLD="), "{env}");
    let mut stranger = Client::new(agent.socket());
    stranger.hello(TOKEN);
    assert_eq!(stranger.frame().json()["code"], "unauthorized");
    stranger.hello("another");
    assert_eq!(stranger.frame().json()["role"], "agent");
    assert_eq!(client.exec(&json!({"argv": ["true"]})).code(), 0, "who was in stays in");
}

#[test]
fn an_identity_that_cannot_be_had_changes_nothing() {
    let agent = Agent::start();
    let mut client = agent.client();
    let missing = agent.path("no/such/directory");
    let op = json!({"op": "identity", "env": {"NEW": "1"}, "token": "another", "files": {missing: ""}});
    assert_eq!(client.call(&op).error(), "not_found");
    for broken in [
        json!({"env": {"A=B": ""}, "entropy": "x"}),
        json!({"token": "", "entropy": "x"}),
        json!({"entropy": "x".repeat(4097)}),
        json!({"hooks": "after-lunch"}),
        json!({"hooks": "after-restore", "timeout_s": 0}),
    ] {
        let op = support::with(json!({"op": "identity"}), &broken);
        assert_eq!(client.call(&op).error(), "bad_request", "{broken}");
    }
    assert_eq!(client.call(&json!({"op": "identity", "files": {"relative": ""}})).error(), "invalid_path");
    assert_eq!(client.exec(&json!({"argv": ["printenv", "NEW"]})).code(), 1);
    agent.client();
}

#[test]
fn hooks_run_in_order_with_the_new_identity() {
    let agent = Agent::start();
    let log = agent.path("log");
    let script = |word: &str| format!("echo {word} $SANDGATE_HOOK $NAME >> {log}");
    let second = hook(&agent, "after-restore/20-second", &script("second"));
    let first = hook(&agent, "after-restore/10-first", &script("first"));
    let mut client = agent.client();
    let op = json!({"op": "identity", "env": {"NAME": "copy"}, "hooks": "after-restore"});
    assert_eq!(client.call(&op).reply(), &json!({"ran": [first, second], "failed": []}));
    assert_eq!(fs::read_to_string(&log).unwrap(), "first after-restore copy\nsecond after-restore copy\n");
    let before = client.call(&json!({"op": "hooks", "stage": "before-pause"}));
    assert_eq!(before.reply(), &json!({"ran": [], "failed": []}));
    let left = client.call(&json!({"op": "processes"}));
    assert_eq!(left.reply()["processes"], json!([]), "a hook is no process of the user's");
}

#[test]
fn a_hook_that_fails_is_told_and_does_not_stop_the_others() {
    let agent = Agent::start();
    let noisy = "yes | head -c 100000; echo why >&2; exit 3";
    let failing = hook(&agent, "before-snapshot/1", noisy);
    let broken = hook(&agent, "before-snapshot/2", "");
    fs::write(&broken, "#!/no/such/interpreter\n").unwrap();
    let good = hook(&agent, "before-snapshot/3", "true");
    let mut client = agent.client();
    let outcome = client.call(&json!({"op": "hooks", "stage": "before-snapshot"}));
    let reply = outcome.reply();
    assert_eq!(reply["ran"], json!([good]));
    let failed = &reply["failed"];
    assert_eq!((&failed[0]["path"], &failed[0]["exit_code"]), (&json!(failing), &json!(3)));
    let output = failed[0]["output"].as_str().unwrap();
    assert!(output.len() <= 5000 && output.ends_with("why\n"), "{output:?}");
    assert_eq!((&failed[1]["path"], &failed[1]["reason"]), (&json!(broken), &json!("not_executable")));
}

#[test]
fn hooks_have_one_time_limit_and_are_killed_with_their_children() {
    let agent = Agent::start();
    let pids = agent.path("pids");
    let slow = format!("trap '' TERM; sleep 300 & echo $! > {pids}; echo $$ >> {pids}; wait; wait");
    hook(&agent, "after-resume/1-slow", &slow);
    let late = hook(&agent, "after-resume/2-late", "true");
    let mut client = agent.client();
    let began = Instant::now();
    let outcome = client.call(&json!({"op": "hooks", "stage": "after-resume", "timeout_s": 3}));
    assert!(began.elapsed() < Duration::from_secs(20));
    let reply = outcome.reply();
    assert_eq!(reply["ran"], json!([]));
    assert_eq!(reply["failed"][0]["reason"], "timeout");
    assert_eq!(reply["failed"][1], json!({"path": late, "reason": "not_started", "output": ""}));
    for pid in fs::read_to_string(&pids).unwrap().lines() {
        let stat = format!("/proc/{pid}/stat");
        let is_over = || fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "));
        eventually("nothing of a killed hook goes on", is_over);
    }
}

#[test]
fn a_client_that_leaves_does_not_keep_hooks_from_ending() {
    let agent = Agent::start();
    let ended = agent.path("ended");
    hook(&agent, "before-pause", &format!("sleep 0.2; echo > {ended}"));
    let mut client = agent.client();
    client.open(&json!({"op": "hooks", "stage": "before-pause"}));
    client.call(&json!({"op": "metrics"}));
    drop(client);
    eventually("the hook runs to its end", || Path::new(&ended).exists());
    assert_eq!(agent.client().exec(&json!({"argv": ["true"]})).code(), 0);
}
