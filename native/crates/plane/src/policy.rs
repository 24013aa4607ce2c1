//! What pages of other sites may do with a preview, or with the API: read it (CORS) and frame it.
//!
//! A part that is not set is left to the server behind: its own fields pass. One that is set replaces them.

/// How long a browser may remember the answer to a preflight request.
const MAX_AGE_S: u32 = 600;
/// Fields of our own answers that tell a program something; with credentials they must be named.
const OWN_FIELDS: &[u8] = b"Retry-After, X-Request-Id";

/// What is allowed.
#[derive(Debug, Default)]
pub struct Policy {
    cors: Option<Cors>,
    /// The value of `frame-ancestors`.
    ancestors: Option<Box<str>>,
}

#[derive(Debug)]
struct Cors {
    origins: Vec<Box<str>>,
    is_credentialed: bool,
}

/// A request as far as a policy looks at it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visit<'a> {
    /// `Origin`
    pub origin: Option<&'a [u8]>,
    /// `Access-Control-Request-Method`, of `OPTIONS` only.
    pub wanted_method: Option<&'a [u8]>,
    /// `Access-Control-Request-Headers`
    pub wanted_fields: Option<&'a [u8]>,
}

/// A policy applied to one request: fields of the response that it replaces.
#[derive(Debug)]
pub struct Terms {
    lines: Vec<u8>,
    is_cors: bool,
    is_credentialed: bool,
    is_framing: bool,
}

impl Policy {
    /// From origins that may read, whether with credentials, and sources that may frame. An error says what is wrong.
    pub fn new(
        origins: Option<Vec<String>>,
        is_credentialed: bool,
        ancestors: Option<&[String]>,
    ) -> Result<Self, &'static str> {
        let is_plain =
            |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && b != b';' && b != b',');
        if !origins.iter().flatten().chain(ancestors.into_iter().flatten()).all(is_plain) {
            return Err("an origin is empty or has a character that no origin has");
        }
        if is_credentialed && origins.iter().flatten().any(|origin| origin == "*") {
            return Err("credentials cannot be allowed to every origin");
        }
        let cors = origins.map(|origins| Cors {
            origins: origins.into_iter().map(String::into_boxed_str).collect(),
            is_credentialed,
        });
        let ancestors = ancestors.map(|sources| match sources {
            [] => "'none'".into(),
            sources => sources.join(" ").into_boxed_str(),
        });
        Ok(Self { cors, ancestors })
    }

    /// The answer to a preflight request, without an end to its fields, if this is one and CORS is ours. An error means
    /// that the origin is not allowed.
    pub fn preflight(&self, visit: &Visit<'_>) -> Option<Result<Vec<u8>, ()>> {
        let (cors, origin, method) = (self.cors.as_ref()?, visit.origin?, visit.wanted_method?);
        if !cors.allows(origin) {
            return Some(Err(()));
        }
        let mut out = b"HTTP/1.1 204 No Content\r\n".to_vec();
        cors.push(&mut out, origin);
        push(&mut out, "Access-Control-Allow-Methods", method);
        if let Some(fields) = visit.wanted_fields {
            push(&mut out, "Access-Control-Allow-Headers", fields);
        }
        push(&mut out, "Access-Control-Max-Age", MAX_AGE_S.to_string().as_bytes());
        Some(Ok(out))
    }

    /// What holds for the response to a request.
    pub fn terms(&self, visit: &Visit<'_>) -> Terms {
        let mut lines = Vec::new();
        if let Some(cors) = &self.cors {
            match visit.origin.filter(|origin| cors.allows(origin)) {
                Some(origin) => {
                    cors.push(&mut lines, origin);
                    if !cors.is_credentialed {
                        push(&mut lines, "Access-Control-Expose-Headers", b"*");
                    }
                }
                None => push(&mut lines, "Vary", b"Origin"),
            }
        }
        if let Some(ancestors) = &self.ancestors {
            push(&mut lines, "Content-Security-Policy", format!("frame-ancestors {ancestors}").as_bytes());
        }
        Terms {
            lines,
            is_cors: self.cors.is_some(),
            is_credentialed: self.cors.as_ref().is_some_and(|cors| cors.is_credentialed),
            is_framing: self.ancestors.is_some(),
        }
    }
}

impl Cors {
    fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|known| **known == *"*" || known.as_bytes() == origin)
    }

    fn push(&self, out: &mut Vec<u8>, origin: &[u8]) {
        push(out, "Access-Control-Allow-Origin", origin);
        if self.is_credentialed {
            push(out, "Access-Control-Allow-Credentials", b"true");
        }
        push(out, "Vary", b"Origin");
    }
}

impl Terms {
    /// The fields to add.
    pub fn lines(&self) -> &[u8] {
        &self.lines
    }

    /// Appends the fields for an answer of our own.
    pub fn push_own(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.lines);
        if self.is_credentialed {
            // Without an allowed origin nobody looks at it.
            push(out, "Access-Control-Expose-Headers", OWN_FIELDS);
        }
    }

    /// What is left of a field that the server behind has sent, as a whole line; none: it passes as it is.
    pub fn replaced(&self, name: &[u8], value: &[u8]) -> Option<Vec<u8>> {
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        if self.is_cors && is_allowance(name) {
            // With credentials, exposed names must be listed, and only the server knows them.
            return (!self.is_credentialed || !is("Access-Control-Expose-Headers")).then(Vec::new);
        }
        if self.is_framing && is("X-Frame-Options") {
            return Some(Vec::new());
        }
        (self.is_framing && is("Content-Security-Policy")).then(|| without_ancestors(value))
    }
}

/// Whether a field is part of CORS.
fn is_allowance(name: &[u8]) -> bool {
    let prefix = b"access-control-";
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// A `Content-Security-Policy` line without its `frame-ancestors`; nothing if that was all. Several policies, separated
/// by commas, hold at once.
fn without_ancestors(value: &[u8]) -> Vec<u8> {
    let is_ancestors = |directive: &&[u8]| {
        let name = directive.split(u8::is_ascii_whitespace).next().unwrap_or_default();
        name.eq_ignore_ascii_case(b"frame-ancestors")
    };
    let policies: Vec<Vec<u8>> = value
        .split(|&b| b == b',')
        .map(|policy| {
            let directives = policy.split(|&b| b == b';').map(<[u8]>::trim_ascii);
            let kept: Vec<&[u8]> = directives.filter(|one| !one.is_empty() && !is_ancestors(one)).collect();
            kept.join(&b"; "[..])
        })
        .filter(|policy| !policy.is_empty())
        .collect();
    let mut out = Vec::new();
    if !policies.is_empty() {
        push(&mut out, "Content-Security-Policy", &policies.join(&b", "[..]));
    }
    out
}

fn push(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing() -> Terms {
        Policy::new(None, false, Some(&["'self'".into()])).expect("a policy").terms(&Visit::default())
    }

    #[test]
    fn frame_ancestors_are_taken_out_of_every_policy() {
        let left = |value: &str| {
            let line = framing().replaced(b"content-security-policy", value.as_bytes()).expect("replaced");
            String::from_utf8(line).expect("text")
        };
        assert_eq!(left("frame-ancestors 'none'"), "");
        assert_eq!(left("Frame-Ancestors *; ; "), "");
        assert_eq!(
            left("default-src 'self';frame-ancestors 'none'; img-src *"),
            "Content-Security-Policy: default-src 'self'; img-src *\r\n"
        );
        assert_eq!(
            left("frame-ancestors a, script-src b;frame-ancestors c"),
            "Content-Security-Policy: script-src b\r\n"
        );
    }

    #[test]
    fn what_is_not_set_is_left_alone() {
        assert_eq!(framing().replaced(b"Access-Control-Allow-Origin", b"*"), None);
        let cors = Policy::new(Some(vec!["*".into()]), false, None).expect("a policy");
        let terms = cors.terms(&Visit { origin: Some(b"https://a"), ..Visit::default() });
        assert_eq!(terms.replaced(b"X-Frame-Options", b"DENY"), None);
        assert_eq!(terms.replaced(b"access-control-allow-origin", b"*"), Some(Vec::new()));
    }

    #[test]
    fn what_would_add_a_field_or_a_directive_is_refused() {
        for bad in ["", "a b", "a\r\nb", "a;b", "a,b", "\u{e9}"] {
            assert!(Policy::new(Some(vec![bad.into()]), false, None).is_err(), "{bad:?}");
            assert!(Policy::new(None, false, Some(&[bad.into()])).is_err(), "{bad:?}");
        }
        assert!(Policy::new(Some(vec!["*".into()]), true, None).is_err());
    }
}
