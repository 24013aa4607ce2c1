//! The vectors shared with the Python twin.

use sandgate_hosts::host::{HostError, HostName, SandboxName, Target, classify};
use serde_json::{Value, json};

fn observed(host: &str, domains: &[String]) -> Value {
    let name = match HostName::parse(host.as_bytes()) {
        Ok(name) => name,
        Err(HostError::Empty) => return json!({"error": "empty"}),
        Err(HostError::TooLong) => return json!({"error": "too_long"}),
        Err(HostError::BadName) => return json!({"error": "bad_name"}),
        Err(HostError::BadPort) => return json!({"error": "bad_port"}),
    };
    match classify(name.as_str(), domains) {
        Target::Api => json!({"kind": "api"}),
        Target::Reserved => json!({"kind": "reserved"}),
        Target::Preview { port, sandbox: SandboxName::Slug(slug) } => {
            json!({"kind": "preview", "port": port, "slug": slug})
        }
        Target::Preview { port, sandbox: SandboxName::IdPrefix(id) } => {
            json!({"kind": "preview", "port": port, "id_prefix": id})
        }
    }
}

#[test]
fn every_vector_holds() {
    let vectors: Value =
        serde_json::from_str(include_str!("../../../../tests/vectors/hosts.json")).expect("valid JSON");
    let cases = vectors["cases"].as_array().expect("a list of cases");
    assert!(cases.len() > 50);
    for case in cases {
        let domains = case.get("domains").unwrap_or(&vectors["domains"]);
        let domains: Vec<String> = serde_json::from_value(domains.clone()).expect("a list of names");
        let host = case["host"].as_str().expect("a host");
        assert_eq!(observed(host, &domains), case["want"], "{host}");
    }
}
