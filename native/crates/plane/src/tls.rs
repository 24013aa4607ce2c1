//! TLS: certificates from a directory, chosen by the name a client asks for, renewed while serving.
//!
//! ```text
//! directory ──changed?──▶ pairs ──▶ index (one atomic pointer) ◀── handshakes
//! ```
//!
//! Replacing the index touches no connection: a handshake takes what is there when it begins. A pair that cannot be
//! used leaves its predecessor in place, so a renewal may write its two files in any order.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// HTTP/2, as ALPN spells it.
pub const ALPN_HTTP2: &[u8] = b"h2";
const ALPN_HTTP11: &[u8] = b"http/1.1";
/// The pair for clients that name no host, or one that no certificate covers.
const DEFAULT_PAIR: &str = "default";

/// The certificates in force, by host name.
#[derive(Debug, Default)]
struct Index {
    exact: HashMap<String, Arc<CertifiedKey>>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Arc<CertifiedKey>>,
    default: Option<Arc<CertifiedKey>>,
}

impl Index {
    fn add(&mut self, name: &str, key: &Arc<CertifiedKey>) {
        let name = name.to_ascii_lowercase();
        match name.strip_prefix("*.") {
            Some(parent) => self.wildcard.insert(parent.to_owned(), Arc::clone(key)),
            None => self.exact.insert(name, Arc::clone(key)),
        };
    }

    fn find(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        self.exact.get(name).or_else(|| self.wildcard.get(name.split_once('.')?.1))
    }
}

/// Answers handshakes from the index in force.
#[derive(Debug, Default)]
struct Chooser(ArcSwap<Index>);

impl ResolvesServerCert for Chooser {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let index = self.0.load();
        // rustls gives the name in lower case.
        let named = hello.server_name().and_then(|name| index.find(name));
        named.or(index.default.as_ref()).cloned()
    }
}

/// What tells one version of a file from the next.
type Stamp = (u64, i64, i64, u64);

fn stamp(path: &Path) -> Option<Stamp> {
    let file = std::fs::metadata(path).ok()?;
    Some((file.ino(), file.mtime(), file.mtime_nsec(), file.size()))
}

/// A certificate with its key, and the names it is good for.
#[derive(Clone)]
struct Pair {
    names: Vec<String>,
    key: Arc<CertifiedKey>,
}

struct Known {
    stamps: (Option<Stamp>, Option<Stamp>),
    pair: Option<Pair>,
}

/// The directory of certificates.
pub struct Certificates {
    directory: PathBuf,
    provider: Arc<CryptoProvider>,
    known: BTreeMap<String, Known>,
    chooser: Arc<Chooser>,
}

impl Certificates {
    /// Reads `directory`. It must hold at least one pair that can be used.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let mut certificates = Self {
            directory: directory.to_owned(),
            provider: Arc::new(ring::default_provider()),
            known: BTreeMap::new(),
            chooser: Arc::default(),
        };
        certificates.refresh()?;
        if certificates.known.values().all(|known| known.pair.is_none()) {
            let message = format!("{} holds no usable NAME.crt with its NAME.key", directory.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        Ok(certificates)
    }

    /// The settings of a listener that follows this directory.
    pub fn server_config(&self) -> io::Result<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::<Chooser>::clone(&self.chooser));
        config.alpn_protocols = vec![ALPN_HTTP2.to_vec(), ALPN_HTTP11.to_vec()];
        // Clients resume with any worker, and nothing is stored for them.
        config.ticketer = ring::Ticketer::new().map_err(io::Error::other)?;
        Ok(config)
    }

    /// Reads what has changed since the last time; returns whether anything had.
    pub fn refresh(&mut self) -> io::Result<bool> {
        let names = pair_names(&self.directory)?;
        let mut before = std::mem::take(&mut self.known);
        let mut is_changed = false;
        for name in names {
            let (certificate, key) = self.paths(&name);
            let stamps = (stamp(&certificate), stamp(&key));
            let known = match before.remove(&name) {
                Some(known) if known.stamps == stamps => known,
                previous => {
                    is_changed = true;
                    Known { stamps, pair: self.renewed(&name, previous.and_then(|known| known.pair)) }
                }
            };
            self.known.insert(name, known);
        }
        is_changed |= !before.is_empty();
        if is_changed {
            self.publish();
        }
        Ok(is_changed)
    }

    fn paths(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.directory.join(format!("{name}.crt")), self.directory.join(format!("{name}.key")))
    }

    fn renewed(&self, name: &str, previous: Option<Pair>) -> Option<Pair> {
        let (certificate, key) = self.paths(name);
        match load(&certificate, &key, &self.provider) {
            Ok(pair) => {
                crate::log::info("certificate loaded", &format_args!("{name}: {}", pair.names.join(", ")));
                Some(pair)
            }
            Err(error) => {
                crate::log::warning("certificate unusable", &format_args!("{name}: {error}"));
                previous
            }
        }
    }

    fn publish(&self) {
        let mut index = Index::default();
        for (name, known) in &self.known {
            let Some(pair) = &known.pair else { continue };
            for host in &pair.names {
                index.add(host, &pair.key);
            }
            if name == DEFAULT_PAIR {
                index.default = Some(Arc::clone(&pair.key));
            }
        }
        self.chooser.0.store(Arc::new(index));
    }
}

/// The NAMEs of `NAME.crt`, sorted: where two certificates cover a host, the last one wins, always the same.
fn pair_names(directory: &Path) -> io::Result<Vec<String>> {
    let describe = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", directory.display()));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(describe)? {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|name| name.strip_suffix(".crt")).map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

fn load(certificate: &Path, key: &Path, provider: &CryptoProvider) -> io::Result<Pair> {
    let describe =
        |path: &Path, error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", path.display()));
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| describe(certificate, &error))?;
    let leaf = chain.first().ok_or_else(|| describe(certificate, &"no certificate"))?;
    let names = webpki::EndEntityCert::try_from(leaf)
        .map_err(|error| describe(certificate, &error))?
        .valid_dns_names()
        .map(str::to_owned)
        .collect();
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| describe(key, &error))?;
    // Fails when the key belongs to another certificate.
    let key = CertifiedKey::from_der(chain, private, provider).map_err(|error| describe(key, &error))?;
    Ok(Pair { names, key: Arc::new(key) })
}
