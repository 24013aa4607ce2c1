//! Files: content, listings, changes, and what is refused.

mod support;

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use sandgate_frame::Kind;
use serde_json::json;
use support::{Agent, checksum, eventually, user};

fn mode_of(path: &str) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn names_in(directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read_back() {
    let agent = Agent::start();
    let mut client = agent.client();
    let every_byte: Vec<u8> = (0..=255).collect();
    for (name, content) in [("a b#.txt", &b"text\n"[..]), ("empty", b""), ("deep/er/binary", &every_byte)] {
        let path = agent.path(name);
        let written = client.write_file(&json!({"path": path}), content);
        assert_eq!(written.reply()["size"], content.len());
        assert_eq!(written.reply()["resolved_path"], path);
        let read = client.call(&json!({"op": "read", "path": path}));
        assert_eq!(read.output.get(&1).cloned().unwrap_or_default(), content);
        assert_eq!((read.ends[&1], read.reply()["size"].as_u64()), (content.len() as u64, Some(content.len() as u64)));
        assert_eq!(mode_of(&path), 0o644);
    }
}

#[test]
fn parts_of_a_file_can_be_read() {
    let agent = Agent::start();
    let mut client = agent.client();
    let path = agent.path("file");
    std::fs::write(&path, "0123456789").unwrap();
    let cases =
        [((3, Some(4)), "3456"), ((8, Some(100)), "89"), ((10, None), ""), ((99, None), ""), ((0, Some(0)), "")];
    for ((offset, length), expected) in cases {
        let read = client.call(&json!({"op": "read", "path": path, "offset": offset, "length": length}));
        assert_eq!((read.text(1).as_str(), read.ends[&1]), (expected, expected.len() as u64));
    }
    assert_eq!(client.call(&json!({"op": "read", "path": path, "offset": u64::MAX})).error(), "bad_request");
    // The size of such a file is only known by reading it.
    assert!(client.call(&json!({"op": "read", "path": "/proc/self/status"})).text(1).contains("sandgate-agent"));
}

#[test]
fn a_large_file_is_written_by_credit() {
    const BYTES: usize = 16 * 1024 * 1024;
    let agent = Agent::start();
    let mut client = agent.client();
    let path = agent.path("large");
    let content: Vec<u8> = (0..BYTES as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let stream = client.open(&json!({"op": "write", "path": path, "user": user()}));
    let (mut sent, mut credit) = (0, 1024 * 1024);
    while sent < BYTES {
        if credit == 0 {
            let frame = client.frame();
            assert_eq!(frame.kind, Kind::Credit);
            credit += frame.count() as usize;
        }
        let piece = credit.min(256 * 1024).min(BYTES - sent);
        client.data(stream, sent as u64, &content[sent..sent + piece]);
        sent += piece;
        credit -= piece;
    }
    client.count(Kind::End, 0, stream, BYTES as u64);
    assert_eq!(client.collect(stream).reply()["size"], BYTES);
    assert_eq!(checksum(&std::fs::read(&path).unwrap()), checksum(&content));
}

#[test]
fn a_replaced_file_keeps_its_mode_and_a_link_its_target() {
    let agent = Agent::start();
    let mut client = agent.client();
    let (file, link) = (agent.path("script"), agent.path("link"));
    std::fs::write(&file, "old").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o751)).unwrap();
    symlink("script", &link).unwrap();
    let before = std::fs::metadata(&file).unwrap().ino();
    let written = client.write_file(&json!({"path": link}), b"new");
    assert_eq!((&written.reply()["path"], &written.reply()["resolved_path"]), (&json!(link), &json!(file)));
    assert_eq!((std::fs::read_to_string(&file).unwrap().as_str(), mode_of(&file)), ("new", 0o751));
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_ne!(std::fs::metadata(&file).unwrap().ino(), before, "readers of the old file keep it whole");
    client.write_file(&json!({"path": file, "mode": 0o600}), b"newer").reply();
    assert_eq!(mode_of(&file), 0o600);
}

#[test]
fn a_write_that_does_not_end_leaves_nothing() {
    let agent = Agent::start();
    let file = agent.path("dir/file");
    let directory = agent.path("dir");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(&file, "old").unwrap();
    for how in ["close", "cut", "wrong end"] {
        let mut client = agent.client();
        let stream = client.open(&json!({"op": "write", "path": file, "user": user()}));
        client.data(stream, 0, b"half of it");
        eventually("the content is on its way", || names_in(&directory).len() == 2);
        match how {
            "close" => client.send(Kind::Close, stream, &[]),
            "cut" => drop(client),
            _ => {
                client.count(Kind::End, 0, stream, 4);
                assert_eq!(client.collect_until(stream, |_| false).error(), "bad_request");
            }
        }
        eventually("only the old file is left", || names_in(&directory) == ["file"]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let agent = Agent::start();
    let directory = agent.path("small");
    std::fs::create_dir(&directory).unwrap();
    let mut client = agent.client();
    // A file size limit stands in for the disk: it needs no mount.
    let mounted = client.exec(&json!({"argv": ["mount", "-t", "tmpfs", "-o", "size=256k", "none", directory]}));
    let file = format!("{directory}/file");
    if mounted.code() == 0 {
        let kept = client.write_file(&json!({"path": file}), b"kept");
        let full = client.write_file(&json!({"path": file}), &vec![b'x'; 700_000]);
        let appended = client.write_file(&json!({"path": file, "append": true}), &vec![b'x'; 150_000]);
        let content = std::fs::read_to_string(&file);
        let names = names_in(&directory);
        client.exec(&json!({"argv": ["umount", directory]}));
        kept.reply();
        assert_eq!((full.error(), appended.error()), ("no_space", "no_space"));
        assert_eq!((content.unwrap().as_str(), names), ("kept", vec!["file".to_owned()]));
    } else {
        // Without the right to mount, the one full device every machine has.
        assert_eq!(client.write_file(&json!({"path": "/dev/full"}), b"x").error(), "not_regular");
    }
}

#[test]
fn appending_adds_and_creates() {
    let agent = Agent::start();
    let mut client = agent.client();
    let path = agent.path("log");
    for _ in 0..3 {
        client.write_file(&json!({"path": path, "append": true}), b"line\n").reply();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "line\nline\nline\n");
    assert_eq!(names_in(Path::new(&path).parent().unwrap().to_str().unwrap()), ["log"]);
}

#[test]
fn bad_paths_are_refused_clearly() {
    let agent = Agent::start();
    let mut client = agent.client();
    let (fifo, socket, long) = (agent.path("fifo"), agent.path("socket"), format!("/{}", "x".repeat(256)));
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    symlink("loop", agent.path("loop")).unwrap();
    std::fs::write(agent.path("file"), "").unwrap();
    let cases = [
        ("relative".to_owned(), "invalid_path"),
        (String::new(), "invalid_path"),
        ("/nul\0".to_owned(), "invalid_path"),
        (long, "invalid_path"),
        ("/x".repeat(2100), "invalid_path"),
        (agent.path("loop"), "invalid_path"),
        (agent.path("missing"), "not_found"),
        (agent.path("file/below"), "not_a_directory"),
        (agent.path(""), "is_a_directory"),
        (fifo.clone(), "not_regular"),
        (socket, "not_regular"),
        ("/dev/null".to_owned(), "not_regular"),
    ];
    for (path, code) in &cases {
        assert_eq!(client.call(&json!({"op": "read", "path": path})).error(), *code, "read {path:?}");
        if *code != "not_found" {
            let stream = client.open(&json!({"op": "write", "path": path, "user": user()}));
            assert_eq!(client.collect(stream).error(), *code, "write {path:?}");
        }
    }
    let missing = json!({"path": agent.path("no/such/parent"), "parents": false});
    assert_eq!(client.write_file(&missing, b"x").error(), "not_found");
    assert_eq!(client.call(&json!({"op": "list", "path": agent.path("file")})).error(), "not_a_directory");
    assert_eq!(client.call(&json!({"op": "read"})).error(), "bad_request");
    assert_eq!(client.call(&json!({"op": "list", "path": "/", "depth": 0})).error(), "bad_request");
    assert_eq!(client.call(&json!({"op": "stat", "path": fifo})).reply()["type"], "other");
}

#[test]
fn listings_are_sorted_deep_and_bounded() {
    let agent = Agent::start();
    let mut client = agent.client();
    for name in ["d/b/two", "d/b/one", "d/a", "d/c/x/y"] {
        client.write_file(&json!({"path": agent.path(name)}), b"x").reply();
    }
    symlink("b", agent.path("d/link")).unwrap();
    let paths = |depth: usize, limit: usize| {
        let listing =
            agent.client().call(&json!({"op": "list", "path": agent.path("d"), "depth": depth, "limit": limit}));
        let entries = listing.reply()["entries"].as_array().unwrap().clone();
        let base = agent.path("d/");
        let names: Vec<String> = entries
            .iter()
            .map(|entry| entry["path"].as_str().unwrap().strip_prefix(&base).unwrap().to_owned())
            .collect();
        (names.join(" "), listing.reply()["truncated"].as_bool().unwrap())
    };
    assert_eq!(paths(1, 100), ("a b c link".to_owned(), false));
    assert_eq!(paths(2, 100), ("a b b/one b/two c c/x link".to_owned(), false));
    assert_eq!(paths(9, 8), ("a b b/one b/two c c/x c/x/y link".to_owned(), false));
    assert_eq!(paths(9, 7), ("a b b/one b/two c c/x c/x/y".to_owned(), true));
    let through_link = client.call(&json!({"op": "list", "path": agent.path("d/link")}));
    assert_eq!(through_link.reply()["resolved_path"], agent.path("d/b"));
    assert_eq!(through_link.reply()["entries"][0]["path"], agent.path("d/link/one"));
}

#[test]
fn ten_thousand_entries_and_names_that_are_no_text_are_listed() {
    let agent = Agent::start();
    let directory = agent.path("many");
    std::fs::create_dir(&directory).unwrap();
    for i in 0..10_000 {
        std::fs::write(format!("{directory}/{i:05}"), "").unwrap();
    }
    std::fs::write(Path::new(&directory).join(std::ffi::OsStr::from_bytes(b"z\xff")), "").unwrap();
    let listing = agent.client().call(&json!({"op": "list", "path": directory}));
    let entries = listing.reply()["entries"].as_array().unwrap();
    assert_eq!((entries.len(), listing.reply()["truncated"].as_bool()), (10_001, Some(false)));
    assert_eq!(entries[9_999]["name"], "09999");
    assert_eq!((&entries[10_000]["name"], &entries[10_000]["name_base64"]), (&json!("z\u{fffd}"), &json!("ev8=")));
}

#[test]
fn directories_are_made_moved_copied_and_removed() {
    let agent = Agent::start();
    let mut client = agent.client();
    let at = |name: &str| agent.path(name);
    let mkdir = json!({"op": "mkdir", "path": at("a/b/c"), "parents": true, "user": user()});
    assert_eq!(client.call(&mkdir).reply()["is_dir"], true);
    assert_eq!(client.call(&mkdir).reply()["path"], at("a/b/c"));
    let plain = json!({"op": "mkdir", "path": at("a"), "user": user()});
    assert_eq!(client.call(&plain).error(), "exists");
    let orphan = json!({"op": "mkdir", "path": at("x/y"), "user": user()});
    assert_eq!(client.call(&orphan).error(), "not_found");
    client.write_file(&json!({"path": at("a/b/file"), "mode": 0o755}), b"content").reply();
    symlink("file", at("a/b/link")).unwrap();

    let copy = json!({"op": "copy", "source": at("a"), "destination": at("copy"), "user": user()});
    assert_eq!(client.call(&copy).error(), "is_a_directory");
    let copy = support::with(copy, &json!({"recursive": true}));
    client.call(&copy).reply();
    assert_eq!(std::fs::read_to_string(at("copy/b/link")).unwrap(), "content");
    assert!(std::fs::symlink_metadata(at("copy/b/link")).unwrap().is_symlink());
    assert_eq!(mode_of(&at("copy/b/file")), 0o755);
    assert_eq!(client.call(&copy).error(), "exists");
    let inside =
        json!({"op": "copy", "source": at("a"), "destination": at("a/b/self"), "recursive": true, "user": user()});
    assert_eq!(client.call(&inside).error(), "bad_request");
    let fifo = at("copy/fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let special =
        json!({"op": "copy", "source": at("copy"), "destination": at("half"), "recursive": true, "user": user()});
    assert_eq!(client.call(&special).error(), "not_regular");
    assert_eq!(names_in(&at("")), ["a", "copy"], "half a copy is removed");

    let rename = |source: &str, destination: &str, overwrite: bool| json!({"op": "rename", "source": at(source), "destination": at(destination), "overwrite": overwrite});
    assert_eq!(client.call(&rename("copy", "moved", true)).reply()["path"], at("moved"));
    assert_eq!(client.call(&rename("a/b/file", "moved/b/file", false)).error(), "exists");
    client.call(&rename("a/b/file", "moved/b/file", true)).reply();
    assert_eq!(client.call(&rename("missing", "x", true)).error(), "not_found");
    assert_eq!(client.call(&rename("moved", "moved/b/x", true)).error(), "bad_request");
    assert_eq!(client.call(&rename("a", "moved", true)).error(), "not_empty");

    let remove = |name: &str, recursive: bool| json!({"op": "remove", "path": at(name), "recursive": recursive});
    assert_eq!(client.call(&remove("moved", false)).error(), "not_empty");
    assert_eq!(client.call(&remove("moved", true)).reply()["removed"], 6);
    assert_eq!(client.call(&remove("a/b/link", false)).reply()["removed"], 1);
    assert_eq!(client.call(&remove("a/b/link", false)).error(), "not_found");
    assert_eq!(client.call(&json!({"op": "remove", "path": "/", "recursive": true})).error(), "invalid_path");
    assert_eq!(client.call(&json!({"op": "remove", "path": at("a/.."), "recursive": true})).error(), "invalid_path");
}

#[test]
fn removing_a_tree_spares_what_its_links_point_to() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.write_file(&json!({"path": agent.path("kept/file")}), b"x").reply();
    std::fs::create_dir(agent.path("tree")).unwrap();
    symlink(agent.path("kept"), agent.path("tree/link")).unwrap();
    assert_eq!(
        client.call(&json!({"op": "remove", "path": agent.path("tree"), "recursive": true})).reply()["removed"],
        2
    );
    assert!(Path::new(&agent.path("kept/file")).exists());
}

#[test]
fn permissions_change_alone_or_with_all_below() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.write_file(&json!({"path": agent.path("d/file")}), b"x").reply();
    let chmod = |mode: u32, recursive: bool| json!({"op": "chmod", "path": agent.path("d"), "mode": mode, "recursive": recursive});
    assert_eq!(client.call(&chmod(0o700, false)).reply()["mode"], 0o700);
    assert_eq!((mode_of(&agent.path("d")), mode_of(&agent.path("d/file"))), (0o700, 0o644));
    client.call(&chmod(0o750, true)).reply();
    assert_eq!((mode_of(&agent.path("d")), mode_of(&agent.path("d/file"))), (0o750, 0o750));
    assert_eq!(client.call(&chmod(0o10_000, false)).error(), "bad_request");
    let chown = json!({"op": "chown", "path": agent.path("d"), "user": user(), "recursive": true});
    assert_eq!(client.call(&chown).reply()["owner"], user());
    let unknown = json!({"op": "chown", "path": agent.path("d"), "user": "nobody-here"});
    assert_eq!(client.call(&unknown).error(), "user_unknown");
}

#[test]
fn every_operation_stays_below_its_roots() {
    let agent = Agent::start();
    let mut client = agent.client();
    let (inside, outside) = (agent.path("in"), agent.path("out"));
    client.write_file(&json!({"path": format!("{outside}/secret")}), b"x").reply();
    std::fs::create_dir(&inside).unwrap();
    symlink(&outside, format!("{inside}/escape")).unwrap();
    let bad = format!("{inside}/escape/secret");
    let roots = json!([inside]);
    let operations = [
        json!({"op": "read", "path": bad}),
        json!({"op": "stat", "path": bad}),
        json!({"op": "list", "path": format!("{inside}/escape")}),
        json!({"op": "watch", "path": format!("{inside}/escape")}),
        json!({"op": "write", "path": bad, "user": user()}),
        json!({"op": "write", "path": format!("{inside}/escape/new/file"), "user": user()}),
        json!({"op": "mkdir", "path": format!("{inside}/escape/new"), "user": user()}),
        json!({"op": "mkdir", "path": format!("{inside}/escape/new/er"), "parents": true, "user": user()}),
        json!({"op": "rename", "source": bad, "destination": format!("{inside}/x")}),
        json!({"op": "rename", "source": format!("{inside}/escape"), "destination": format!("{outside}/x")}),
        json!({"op": "copy", "source": bad, "destination": format!("{inside}/x"), "user": user()}),
        json!({"op": "chmod", "path": bad, "mode": 0}),
        json!({"op": "chown", "path": bad, "user": user()}),
        json!({"op": "remove", "path": bad}),
        json!({"op": "remove", "path": format!("{inside}/../out/secret")}),
    ];
    for operation in operations {
        let outcome = client.call(&support::with(operation.clone(), &json!({"roots": roots})));
        assert_eq!(outcome.error(), "forbidden_path", "{operation}");
    }
    assert_eq!((names_in(&inside), names_in(&outside)), (vec!["escape".to_owned()], vec!["secret".to_owned()]));
    let fine = json!({"path": format!("{inside}/sub/file"), "roots": roots});
    client.write_file(&fine, b"x").reply();
    // The link itself lies inside; it may go.
    client.call(&json!({"op": "remove", "path": format!("{inside}/escape"), "roots": roots})).reply();
}

#[test]
fn what_root_makes_belongs_to_the_user_asked_for() {
    if !nix::unistd::geteuid().is_root() {
        return; // only root can give files away
    }
    let agent = Agent::start();
    let mut client = agent.client();
    let path = agent.path("made/by/nobody");
    client.write_file(&json!({"path": path, "user": "nobody"}), b"x").reply();
    let owners =
        [&path, &agent.path("made/by"), &agent.path("made")].map(|path| std::fs::metadata(path).unwrap().uid());
    assert_eq!(owners, [65_534; 3]);
    client.write_file(&json!({"path": path, "user": "root"}), b"y").reply();
    assert_eq!(std::fs::metadata(&path).unwrap().uid(), 65_534, "a replaced file keeps its owner");
}
