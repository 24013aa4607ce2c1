//! Files of saved machines, for `native.images`.

use std::fs::File;
use std::path::PathBuf;

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use sandgate_restore::{self as restore, Error};

create_exception!(_core, ImageCorrupt, PyValueError, "The bytes of an image are not what they should be.");
create_exception!(_core, ImageTooLarge, PyValueError, "An image has more bytes than were allowed.");

fn raised(error: Error) -> PyErr {
    match error {
        Error::Io(error) => error.into(),
        Error::Corrupt(what) => ImageCorrupt::new_err(what),
        Error::TooLarge => ImageTooLarge::new_err("the image is larger than allowed"),
    }
}

/// Runs work of milliseconds and more without the interpreter.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> restore::Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(raised)
}

/// Size and hash of a file; see `native.images.hash_file`.
#[pyfunction]
fn image_hash(py: Python<'_>, path: PathBuf) -> PyResult<(u64, String)> {
    let found = detached(py, move || restore::hash_file(&path))?;
    Ok((found.size, found.hash.to_hex().to_string()))
}

/// See `native.images.pack`.
#[pyfunction]
fn image_pack(py: Python<'_>, image: PathBuf, names: Vec<String>, chunks: PathBuf) -> PyResult<u64> {
    detached(py, move || restore::pack(&image, &names, &chunks))
}

/// See `native.images.unpack`.
#[pyfunction]
fn image_unpack(py: Python<'_>, image: PathBuf, chunks: PathBuf) -> PyResult<()> {
    detached(py, move || restore::unpack(&image, &chunks))
}

/// See `native.images.collect`.
#[pyfunction]
fn image_collect(py: Python<'_>, indexes: Vec<PathBuf>, chunks: PathBuf) -> PyResult<u64> {
    detached(py, move || restore::collect(&indexes, &chunks))
}

/// See `native.images.export_to`.
#[pyfunction]
fn image_export(
    py: Python<'_>,
    target: PathBuf,
    manifest: Vec<u8>,
    image: PathBuf,
    names: Vec<String>,
) -> PyResult<()> {
    detached(py, move || restore::export(File::options().write(true).open(target)?, &manifest, &image, &names))
}

/// See `native.images.import_from`.
#[pyfunction]
fn image_import(py: Python<'_>, source: PathBuf, image: PathBuf, bytes_max: u64) -> PyResult<Vec<u8>> {
    detached(py, move || restore::import(File::open(source)?, &image, bytes_max))
}

/// Adds what is in here to the module.
pub fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("ImageCorrupt", module.py().get_type::<ImageCorrupt>())?;
    module.add("ImageTooLarge", module.py().get_type::<ImageTooLarge>())?;
    module.add_function(wrap_pyfunction!(image_hash, module)?)?;
    module.add_function(wrap_pyfunction!(image_pack, module)?)?;
    module.add_function(wrap_pyfunction!(image_unpack, module)?)?;
    module.add_function(wrap_pyfunction!(image_collect, module)?)?;
    module.add_function(wrap_pyfunction!(image_export, module)?)?;
    module.add_function(wrap_pyfunction!(image_import, module)?)
}
