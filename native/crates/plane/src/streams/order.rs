//! What the API orders for a connection: the value of `X-Sandgate-Stream`.

use sandgate_hosts::access::Digest;
use serde::Deserialize;

use super::event::Event;
use super::pattern::Pattern;
use crate::http::fields::{Field, Name};
use crate::message;

/// The header of an order.
const HEADER: &[u8] = b"x-sandgate-stream";

/// An order.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Order {
    /// Events after the backlog that is the body of the answer.
    Events(Selection),
    /// A process's output; the body says which and how ([`super::wanted::Wanted`]).
    Output,
    /// A file's content; the body says which ([`super::file::Wanted`]).
    File,
    /// The request's body is to become a file; the body says which ([`super::upload::Wanted`]).
    Upload,
}

/// Which events a subscriber gets, and for how long.
#[derive(Debug, Deserialize)]
pub struct Selection {
    /// The log's topic.
    pub topic: Box<str>,
    /// One of these must match an event's type; none means all.
    #[serde(default)]
    types: Vec<Pattern>,
    resource_type: Option<Box<str>>,
    resource_id: Option<Box<str>>,
    /// The API key on whose behalf it is: the stream ends when the key is revoked or expires.
    #[serde(default, deserialize_with = "message::optional_digest")]
    pub key: Option<Digest>,
}

impl Selection {
    /// Whether an event of the topic is wanted.
    pub fn takes(&self, event: &Event) -> bool {
        let is = |wanted: &Option<Box<str>>, given: &str| wanted.as_deref().is_none_or(|wanted| wanted == given);
        is(&self.resource_id, &event.resource_id)
            && is(&self.resource_type, &event.resource_type)
            && (self.types.is_empty() || self.types.iter().any(|pattern| pattern.matches(&event.kind)))
    }
}

/// The order in an answer's fields, if it holds one. An error means that it cannot be understood.
pub fn find(head: &[u8], fields: &[Field]) -> Option<Result<Order, serde_json::Error>> {
    let field = fields.iter().find(|f| f.name == Name::Private && f.name(head).eq_ignore_ascii_case(HEADER))?;
    Some(read(field.value(head)))
}

/// Reads an order.
pub fn read(value: &[u8]) -> Result<Order, serde_json::Error> {
    serde_json::from_slice(value)
}
