//! The route table: versions, names and what readers see while it changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sandgate_hosts::host::SandboxName;
use sandgate_plane::message::{self, Message};
use sandgate_plane::table::{Found, Table};
use serde_json::json;

const IDS: [&str; 2] = ["c0ffee00-1111-4000-8000-000000000001", "c0ffee00-2222-4000-8000-000000000002"];

fn push(table: &Table, line: &serde_json::Value) {
    let line = line.to_string();
    let message: Message = serde_json::from_str(&line).expect("a message");
    message::apply(message.body, &line, table, &mut None, 100).expect("obeyed");
}

fn put(table: &Table, v: u64, id: &str, slug: &str, address: &str) {
    push(
        table,
        &json!({"t": "sandbox", "v": v, "id": id, "slug": slug, "owner": "w", "address": address, "state": "running"}),
    );
}

fn found(table: &Table, name: SandboxName<'_>) -> String {
    match table.find(name) {
        Found::Sandbox(sandbox) => format!("{}@{}", sandbox.slug, sandbox.v),
        Found::Gone => "gone".into(),
        Found::Unknown => "unknown".into(),
    }
}

#[test]
fn the_newest_version_counts_whatever_the_order() {
    for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
        let table = Table::default();
        for v in order {
            put(&table, v, IDS[0], "a", "10.0.0.1");
        }
        assert_eq!(found(&table, SandboxName::Slug("a")), "a@3");
        assert_eq!(table.sandboxes(), 1);
    }
}

#[test]
fn connections_are_shared_as_long_as_the_address_stays() {
    let table = Table::default();
    let incarnation = || table.get(IDS[0]).expect("there").live.incarnation;
    put(&table, 1, IDS[0], "a", "10.0.0.1");
    let first = incarnation();
    put(&table, 2, IDS[0], "a", "10.0.0.1");
    assert_eq!(incarnation(), first);
    put(&table, 3, IDS[0], "a", "10.0.0.2");
    let second = incarnation();
    assert_ne!(second, first);
    push(&table, &json!({"t": "sandbox_gone", "v": 4, "id": IDS[0]}));
    put(&table, 5, IDS[0], "a", "10.0.0.2");
    assert!(![first, second].contains(&incarnation()));
}

#[test]
fn the_removed_are_remembered_and_then_forgotten() {
    let table = Table::default();
    put(&table, 1, IDS[0], "a", "10.0.0.1");
    push(&table, &json!({"t": "sandbox_gone", "v": 2, "id": IDS[0]}));
    let by_id = SandboxName::IdPrefix("c0ffee001111");
    assert_eq!((found(&table, SandboxName::Slug("a")), found(&table, by_id)), ("gone".into(), "gone".into()));
    table.forget(100);
    assert_eq!(found(&table, SandboxName::Slug("a")), "gone");
    table.forget(101);
    assert_eq!((found(&table, SandboxName::Slug("a")), found(&table, by_id)), ("unknown".into(), "unknown".into()));
    assert_eq!(table.sandboxes(), 0);
}

#[test]
fn a_table_is_the_same_after_its_dump_is_read_back() {
    let table = Table::default();
    put(&table, 1, IDS[0], "a", "10.0.0.1");
    put(&table, 1, IDS[1], "b", "10.0.0.2");
    push(&table, &json!({"t": "sandbox_gone", "v": 2, "id": IDS[1]}));
    for (v, byte) in [(1, "aa"), (2, "bb")] {
        push(&table, &json!({"t": "key", "v": v, "hash": byte.repeat(32), "owner": "w", "expires_at": 5.5}));
    }
    push(&table, &json!({"t": "key_gone", "v": 3, "hash": "bb".repeat(32)}));
    let dump = message::dump(&table);
    let copy = Table::default();
    for line in String::from_utf8(dump.clone()).expect("text").lines() {
        push(&copy, &serde_json::from_str(line).expect("JSON"));
    }
    let sorted = |dump: &[u8]| {
        let mut lines: Vec<_> = String::from_utf8_lossy(dump).lines().map(sort_keys).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&message::dump(&copy)), sorted(&dump));
    assert_eq!(found(&copy, SandboxName::Slug("b")), "gone");
    assert!(copy.key(&[0xaa; 32]).is_some_and(|key| key.expires_at == Some(5.5)));
    assert!(copy.key(&[0xbb; 32]).is_none());
}

fn sort_keys(line: &str) -> String {
    serde_json::from_str::<serde_json::Value>(line).expect("JSON").to_string()
}

#[test]
fn readers_never_miss_a_sandbox_that_is_only_changing() {
    let table = Arc::new(Table::default());
    put(&table, 1, IDS[0], "a", "10.0.0.1");
    let is_over = Arc::new(AtomicBool::new(false));
    let reader = {
        let (table, is_over) = (Arc::clone(&table), Arc::clone(&is_over));
        std::thread::spawn(move || {
            let mut last = 0;
            while !is_over.load(Ordering::Relaxed) {
                let Found::Sandbox(sandbox) = table.find(SandboxName::Slug("a")) else { panic!("missed") };
                assert!(sandbox.v >= last, "went back in time");
                last = sandbox.v;
            }
        })
    };
    for v in 2..20_000 {
        put(&table, v, IDS[0], "a", "10.0.0.1");
    }
    is_over.store(true, Ordering::Relaxed);
    reader.join().expect("no reader missed it");
}
