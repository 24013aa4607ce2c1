//! Commands: results, failures, environment, input, signals, limits.

mod support;

use sandgate_frame::Kind;
use serde_json::json;
use support::{Agent, eventually, exec_op, user, with};

#[test]
fn a_command_reports_its_output_and_status() {
    let agent = Agent::start();
    let mut client = agent.client();
    let outcome = client.exec(&json!({"argv": ["echo", "hello"]}));
    assert_eq!((outcome.text(1).as_str(), outcome.code()), ("hello\n", 0));
    assert_eq!((outcome.ends[&1], outcome.ends[&2]), (6, 0));
    let outcome = client.shell("echo out; echo err >&2; exit 7");
    assert_eq!((outcome.text(1).as_str(), outcome.text(2).as_str(), outcome.code()), ("out\n", "err\n", 7));
    assert_eq!(outcome.exit()["reason"], "exited");
}

#[test]
fn bytes_that_are_no_text_pass_untouched() {
    let agent = Agent::start();
    let outcome = agent.client().exec(&json!({"argv": ["printf", r"\000\377\200a\n"]}));
    assert_eq!(outcome.output[&1], b"\x00\xff\x80a\n");
}

#[test]
fn what_cannot_be_started_says_why() {
    let agent = Agent::start();
    let plain = agent.path("plain");
    let broken = agent.path("broken");
    std::fs::write(&plain, "x").unwrap();
    std::fs::write(&broken, "#!/no/such/interpreter\n").unwrap();
    set_mode(&broken, 0o755);
    let mut client = agent.client();
    let cases = [
        (json!({"argv": ["no-such-command"]}), "command_not_found"),
        (json!({"argv": ["/no/such/file"]}), "command_not_found"),
        (json!({"argv": [plain]}), "not_executable"),
        (json!({"argv": [broken]}), "not_executable"),
        (json!({"argv": ["true", "x".repeat(200_000)]}), "bad_request"),
        (json!({"argv": [format!("/{}", "x".repeat(5000))]}), "bad_request"),
        (json!({"argv": ["/"]}), "not_executable"),
        (json!({"argv": ["true"], "cwd": "/no/such/dir"}), "cwd_missing"),
        (json!({"argv": ["true"], "cwd": "/etc/passwd"}), "cwd_missing"),
        (json!({"argv": ["true"], "cwd": "relative"}), "invalid_path"),
        (json!({"argv": ["true"], "user": "nobody-here"}), "user_unknown"),
        (json!({"argv": []}), "bad_request"),
        (json!({"argv": [""]}), "bad_request"),
        (json!({"argv": ["true"], "shell": "true"}), "bad_request"),
        (json!({}), "bad_request"),
        (json!({"argv": ["true", "nul\0byte"]}), "bad_request"),
        (json!({"argv": ["true"], "env": {"A=B": "x"}}), "bad_request"),
        (json!({"argv": ["true"], "env": {"A": "x\0"}}), "bad_request"),
        (json!({"argv": ["true"], "timeout_s": -1}), "bad_request"),
        (json!({"argv": ["true"], "timeout_s": "soon"}), "bad_request"),
        (json!({"argv": ["true"], "id": "i".repeat(65)}), "bad_request"),
        (json!({"argv": ["true"], "offsets": {"9": 1}}), "bad_request"),
        (json!({"argv": ["true"], "log_bytes_max": 0}), "bad_request"),
    ];
    for (more, code) in cases {
        assert_eq!(client.exec(&more).error(), code, "{more}");
    }
    assert_eq!(client.call(&json!({"op": "no-such-operation"})).error(), "unsupported");
    assert_eq!(client.exec(&json!({"argv": ["true"]})).code(), 0);
}

#[test]
fn a_failed_start_leaves_the_id_free() {
    let agent = Agent::start();
    let mut client = agent.client();
    assert_eq!(client.exec(&json!({"id": "again", "argv": ["no-such-command"]})).error(), "command_not_found");
    assert_eq!(client.exec(&json!({"id": "again", "argv": ["true"]})).code(), 0);
}

#[test]
fn a_script_without_interpreter_line_runs_in_sh() {
    let agent = Agent::start();
    let script = agent.path("script");
    std::fs::write(&script, "echo \"$1\"; exit 3\n").unwrap();
    set_mode(&script, 0o755);
    let mut client = agent.client();
    for more in [json!({"argv": [script, "x"]}), json!({"shell": format!("{script} x")})] {
        let outcome = client.exec(&more);
        assert_eq!((outcome.text(1).as_str(), outcome.code()), ("x\n", 3), "{more}");
    }
}

#[test]
fn shell_lines_behave_alike_with_and_without_a_shell() {
    let agent = Agent::start();
    let mut client = agent.client();
    let missing = client.shell("no-such-command");
    assert_eq!(missing.code(), 127);
    assert!(missing.text(2).contains("no-such-command: command not found"), "{missing:?}");
    let denied = client.shell("/etc/passwd");
    assert_eq!(denied.code(), 126);
    assert_eq!(client.shell("echo a b").text(1), "a b\n");
    assert_eq!(client.shell("echo 'a  b' | tr a-z A-Z").text(1), "A  B\n");
    assert_eq!(client.shell("cd /usr && pwd").text(1), "/usr\n");
    assert_eq!(client.shell("false").code(), 1);
    assert_eq!(client.shell("").code(), 0);
}

#[test]
fn the_environment_has_its_layers_and_no_secrets() {
    let agent = Agent::start();
    let mut client = agent.client();
    let identity = json!({"op": "identity", "env": {"LAYER": "identity", "MACHINE": "m"}, "unset": ["INHERITED"]});
    client.call(&identity).reply();
    for command in [json!({"argv": ["env"]}), json!({"shell": "env | cat"}), json!({"shell": "env"})] {
        let outcome = client.exec(&with(command, &json!({"env": {"LAYER": "request", "PATH": "/bin:/usr/bin:/mine"}})));
        let text = outcome.text(1);
        let has = |line: &str| assert!(text.lines().any(|other| other == line), "{line} in {text}");
        has("LAYER=request");
        has("MACHINE=m");
        has("PATH=/bin:/usr/bin:/mine");
        has("PWD=/");
        has(&format!("USER={}", user()));
        has(&format!("LOGNAME={}", user()));
        assert!(text.contains("\nHOME=/") || text.starts_with("HOME=/"));
        assert!(!text.contains("INHERITED") && !text.contains("SANDGATE"), "{text}");
    }
    let environ = std::fs::read(format!("/proc/{}/environ", agent.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&environ).contains(support::TOKEN));
}

#[test]
fn a_timeout_ends_the_whole_group_even_if_it_ignores_sigterm() {
    let agent = Agent::start();
    let mut client = agent.client();
    let line = "trap '' TERM; (trap '' TERM; echo child $BASHPID; while :; do sleep 0.1; done) & wait; sleep 60";
    let outcome = client.exec(&json!({"argv": ["bash", "-c", line], "timeout_s": 3}));
    assert_eq!((outcome.code(), &outcome.exit()["reason"]), (124, &json!("timeout")));
    assert_eq!(outcome.exit()["signal"], "SIGKILL");
    let text = outcome.text(1);
    let child: u32 = text.trim().strip_prefix("child ").unwrap().parse().unwrap();
    eventually("the child is gone", || !std::path::Path::new(&format!("/proc/{child}")).exists());
}

#[test]
fn a_leader_that_heeds_sigterm_takes_its_stubborn_child_along() {
    let agent = Agent::start();
    let line = "(trap '' TERM; echo $BASHPID; while :; do sleep 0.1; done) & wait";
    let outcome = agent.client().exec(&json!({"argv": ["bash", "-c", line], "timeout_s": 3}));
    assert_eq!((outcome.code(), &outcome.exit()["signal"]), (124, &json!("SIGTERM")));
    let child = outcome.text(1).trim().to_owned();
    eventually("the child is gone", || !std::path::Path::new(&format!("/proc/{child}")).exists());
}

#[test]
fn a_background_grandchild_does_not_hold_up_the_exit_and_is_not_killed_for_writing() {
    let agent = Agent::start();
    let marker = agent.path("marker");
    let mut client = agent.client();
    let line = format!("(sleep 1; echo late; echo still here > {marker}) & echo early");
    let outcome = client.shell(&line);
    assert_eq!((outcome.text(1).as_str(), outcome.code()), ("early\n", 0));
    eventually("the grandchild lives on", || std::fs::read_to_string(&marker).is_ok_and(|text| text == "still here\n"));
}

#[test]
fn a_grandchild_that_floods_the_pipe_does_not_hold_up_the_exit() {
    let agent = Agent::start();
    let outcome = agent.client().shell("yes & echo $! >&2; exit 5");
    assert_eq!(outcome.code(), 5);
    let pid = outcome.text(2).trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn input_reaches_the_process_and_ends() {
    let agent = Agent::start();
    let mut client = agent.client();
    let stream = client.open(&exec_op(&json!({"argv": ["tr", "a-z", "A-Z"], "stdin": true})));
    client.data(stream, 0, b"hello ");
    client.data(stream, 6, b"world");
    client.count(Kind::End, 0, stream, 11);
    let outcome = client.collect(stream);
    assert_eq!((outcome.text(1).as_str(), outcome.code()), ("HELLO WORLD", 0));
}

#[test]
fn much_input_flows_by_credit() {
    const BYTES: usize = 5 * 1024 * 1024;
    let agent = Agent::start();
    let mut client = agent.client();
    let stream = client.open(&exec_op(&json!({"argv": ["wc", "-c"], "stdin": true})));
    let mut credit = 1024 * 1024;
    let mut sent = 0;
    let piece = vec![b'x'; 64 * 1024];
    while sent < BYTES {
        if credit < piece.len() {
            let frame = client.frame();
            if frame.kind == Kind::Credit {
                credit += frame.count() as usize;
            }
            continue;
        }
        client.data(stream, sent as u64, &piece);
        sent += piece.len();
        credit -= piece.len();
    }
    client.count(Kind::End, 0, stream, sent as u64);
    assert_eq!(client.collect(stream).text(1).trim(), sent.to_string());
}

#[test]
fn input_beyond_the_credit_or_with_a_gap_ends_the_stream_only() {
    let agent = Agent::start();
    let mut client = agent.client();
    let stream = client.open(&exec_op(&json!({"argv": ["sleep", "60"], "stdin": true})));
    for i in 0..30 {
        client.data(stream, i * 65536, &vec![b'x'; 65536]);
    }
    assert_eq!(client.collect(stream).error(), "bad_request");
    let stream = client.open(&exec_op(&json!({"argv": ["cat"], "stdin": true})));
    client.data(stream, 5, b"gap");
    assert_eq!(client.collect(stream).error(), "bad_request");
    assert_eq!(client.exec(&json!({"argv": ["true"]})).code(), 0);
}

#[test]
fn input_to_a_process_that_takes_none_does_no_harm() {
    let agent = Agent::start();
    let mut client = agent.client();
    let stream =
        client.open(&exec_op(&json!({"argv": ["bash", "-c", "exec 0<&-; sleep 0.2; echo done"], "stdin": true})));
    for i in 0..10 {
        client.data(stream, i * 65536, &vec![b'x'; 65536]);
    }
    assert_eq!(client.collect(stream).text(1), "done\n");
}

#[test]
fn processes_are_listed_signalled_and_fed() {
    let agent = Agent::start();
    let mut client = agent.client();
    let op = exec_op(&json!({"id": "cat", "argv": ["cat"], "stdin": true, "background": true, "name": "the cat"}));
    let stream = client.open(&op);
    let pid = client.collect_until(stream, |outcome| outcome.reply.is_some()).reply()["pid"].clone();
    let mut other = agent.client();
    let record = other.call(&json!({"op": "process", "pid": pid})).reply().clone();
    assert_eq!(
        (&record["id"], &record["name"], &record["state"]),
        (&json!("cat"), &json!("the cat"), &json!("running"))
    );
    assert_eq!(record["argv"], json!(["cat"]));
    let written = other.call(&json!({"op": "stdin", "id": "cat", "data_base64": "aGkK"}));
    assert_eq!(written.reply()["written"], 3);
    let outcome = client.collect_until(stream, |outcome| outcome.output.contains_key(&1));
    assert_eq!(outcome.text(1), "hi\n");
    other.call(&json!({"op": "signal", "id": "cat", "signal": "TERM"})).reply();
    let outcome = client.collect(stream);
    assert_eq!((outcome.code(), &outcome.exit()["signal"]), (143, &json!("SIGTERM")));
    let again = other.call(&json!({"op": "signal", "id": "cat", "signal": 15}));
    assert_eq!(again.error(), "process_exited");
    assert_eq!(other.call(&json!({"op": "signal", "id": "nobody", "signal": 15})).error(), "no_such_process");
    assert_eq!(other.call(&json!({"op": "signal", "id": "cat", "signal": "SIGNONE"})).error(), "bad_request");
    let listed = other.call(&json!({"op": "processes"})).reply()["processes"].clone();
    assert_eq!((listed[0]["state"].as_str(), listed[0]["exit_code"].as_i64()), (Some("exited"), Some(143)));
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    let marker = agent.path("orphan");
    agent.client().shell(&format!("(setsid sh -c 'echo $$ > {marker}' &)"));
    let orphan = || std::fs::read_to_string(&marker).unwrap_or_default().trim().to_owned();
    eventually("the orphan has run", || !orphan().is_empty());
    eventually("no zombie is left", || !std::path::Path::new(&format!("/proc/{}", orphan())).exists());
}

#[test]
fn many_commands_at_once_all_end_well() {
    let agent = Agent::start();
    let mut client = agent.client();
    let streams: Vec<u32> =
        (0..100).map(|i| client.open(&exec_op(&json!({"argv": ["echo", i.to_string()]})))).collect();
    let mut outputs = std::collections::BTreeMap::new();
    let mut open = streams.len();
    while open > 0 {
        let frame = client.frame();
        match frame.kind {
            Kind::Data => drop(outputs.insert(frame.stream, frame.payload[8..].to_vec())),
            Kind::Event => client.send(Kind::Ack, frame.stream, &[]),
            Kind::Close => open -= 1,
            Kind::Error => panic!("{}", frame.json()),
            _ => {}
        }
    }
    for (i, stream) in streams.iter().enumerate() {
        assert_eq!(outputs[stream], format!("{i}\n").into_bytes());
    }
    assert_eq!(client.call(&json!({"op": "processes"})).reply()["processes"], json!([]));
}

fn set_mode(path: &str, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}
