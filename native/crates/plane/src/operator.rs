//! What an operator is shown over the control socket: routes, and who uses the plane.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::metrics::Metrics;
use crate::table::{Entry, Sandbox, State, Table};
use crate::trust::{Client, UNIX};
use crate::worker::Census;

/// Sandboxes in one answer: with many ports each they still fit into a line.
const PAGE: usize = 500;
/// Clients and sandboxes shown, the busiest first.
const BUSIEST: usize = 50;

/// One page of the route table in order of ids, from the first one after `after`.
pub fn routes(table: &Table, after: Option<&str>) -> Value {
    let mut found: Vec<(Box<str>, Value)> = Vec::new();
    let mut has_more = false;
    table.each_entry(|key, entry| {
        let Entry::Here(sandbox) = entry else { return };
        if after.is_some_and(|after| key <= after) {
            return;
        }
        if found.len() == PAGE {
            has_more = true;
        } else {
            found.push((key.into(), route(sandbox)));
        }
    });
    let next = if has_more { found.last().map(|(key, _)| key.clone()) } else { None };
    json!({"routes": found.into_iter().map(|(_, route)| route).collect::<Vec<_>>(), "next": next})
}

fn route(sandbox: &Sandbox) -> Value {
    let state = match sandbox.state {
        State::Running => "running",
        State::Starting => "starting",
        State::Frozen => "frozen",
        State::Hibernated => "hibernated",
    };
    let mut ports: Vec<_> = sandbox.ports.iter().collect();
    ports.sort_unstable_by_key(|rule| rule.port);
    let ports: Vec<Value> = ports
        .into_iter()
        .map(|rule| json!({"port": rule.port, "is_public": rule.is_public, "shares": rule.shares.len()}))
        .collect();
    json!({
        "id": sandbox.id, "slug": sandbox.slug, "owner": sandbox.owner, "address": sandbox.address, "state": state,
        "ports": ports, "tokens": sandbox.tokens.len(), "in_flight": in_flight(sandbox),
        "waiting": sandbox.wake.waiting(),
    })
}

fn in_flight(sandbox: &Sandbox) -> u32 {
    sandbox.live.in_flight.load(Ordering::Relaxed)
}

/// Who uses the plane now.
pub fn connections(table: &Table, metrics: &Metrics, census: &Census) -> Value {
    let mut sandboxes = Vec::new();
    table.each_entry(|_, entry| {
        if let Entry::Here(sandbox) = entry
            && (in_flight(sandbox) > 0 || sandbox.wake.waiting() > 0)
        {
            sandboxes.push((in_flight(sandbox), sandbox.wake.waiting(), sandbox.id.clone(), sandbox.slug.clone()));
        }
    });
    sandboxes.sort_unstable_by(|a, b| b.cmp(a));
    sandboxes.truncate(BUSIEST);
    let mut clients: Vec<(Client, usize)> = census.clients();
    clients.sort_unstable_by_key(|&(address, count)| (std::cmp::Reverse(count), address));
    clients.truncate(BUSIEST);
    let sandboxes: Vec<Value> = sandboxes
        .into_iter()
        .map(|(in_flight, waiting, id, slug)| {
            json!({"id": id, "slug": slug, "in_flight": in_flight, "waiting": waiting})
        })
        .collect();
    let name = |client: Client| client.map_or_else(|| UNIX.into(), |address| address.to_string());
    let clients: Vec<Value> =
        clients.into_iter().map(|(client, count)| json!({"address": name(client), "connections": count})).collect();
    json!({
        "connections": metrics.connections(), "tunnels": metrics.tunnels(), "waiting": metrics.waiting(),
        "requests": metrics.requests(), "clients": clients, "sandboxes": sandboxes,
    })
}
