//! The extension module `native._core`.
//!
//! Only converts between Python and the crates that carry the logic. Every function is listed in `native/_core.pyi`.

mod images;
mod pool;

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use sandgate_hosts::host::{HostName, SandboxName, Target, classify};

create_exception!(_core, HostError, PyValueError, "The value of a Host header cannot name anything.");

/// What a host stands for: `(kind, port, slug, id_prefix)`.
type Parsed = (&'static str, Option<u16>, Option<String>, Option<String>);

/// Parses the value of a `Host` header; see `native.hosts.parse_host`.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // What the interpreter hands over is ours.
fn parse_host(header: &str, domains: Vec<String>) -> PyResult<Parsed> {
    let name = HostName::parse(header.as_bytes()).map_err(|error| HostError::new_err(error.to_string()))?;
    Ok(match classify(name.as_str(), &domains) {
        Target::Api => ("api", None, None, None),
        Target::Reserved => ("reserved", None, None, None),
        Target::Preview { port, sandbox: SandboxName::Slug(slug) } => {
            ("preview", Some(port), Some(slug.to_owned()), None)
        }
        Target::Preview { port, sandbox: SandboxName::IdPrefix(id) } => {
            ("preview", Some(port), None, Some(id.to_owned()))
        }
    })
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("HostError", module.py().get_type::<HostError>())?;
    images::add(module)?;
    pool::add(module)?;
    module.add_function(wrap_pyfunction!(parse_host, module)?)
}
