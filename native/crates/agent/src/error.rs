//! Failures as the protocol names them (docs/protocol.md, "Error codes").

use nix::errno::Errno;
use serde_json::json;

/// Code of a failure; the names go over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    BadRequest,
    Unauthorized,
    NotFound,
    Exists,
    NotADirectory,
    IsADirectory,
    NotEmpty,
    PermissionDenied,
    ForbiddenPath,
    NoSpace,
    TooLarge,
    TooMany,
    InvalidPath,
    NotRegular,
    NoSuchProcess,
    ProcessExited,
    CommandNotFound,
    NotExecutable,
    UserUnknown,
    CwdMissing,
    IoError,
    Unsupported,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::NotADirectory => "not_a_directory",
            Self::IsADirectory => "is_a_directory",
            Self::NotEmpty => "not_empty",
            Self::PermissionDenied => "permission_denied",
            Self::ForbiddenPath => "forbidden_path",
            Self::NoSpace => "no_space",
            Self::TooLarge => "too_large",
            Self::TooMany => "too_many",
            Self::InvalidPath => "invalid_path",
            Self::NotRegular => "not_regular",
            Self::NoSuchProcess => "no_such_process",
            Self::ProcessExited => "process_exited",
            Self::CommandNotFound => "command_not_found",
            Self::NotExecutable => "not_executable",
            Self::UserUnknown => "user_unknown",
            Self::CwdMissing => "cwd_missing",
            Self::IoError => "io_error",
            Self::Unsupported => "unsupported",
        }
    }
}

/// Why an operation failed: a code for programs, a sentence for people.
#[derive(Clone, Debug)]
pub struct OpError {
    pub code: Code,
    pub message: String,
}

pub type OpResult<T> = Result<T, OpError>;

impl OpError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, message)
    }

    /// What a failed system call on `what` means to the caller.
    pub fn of_errno(errno: Errno, what: &str) -> Self {
        let code = match errno {
            Errno::ENOENT => Code::NotFound,
            Errno::EEXIST => Code::Exists,
            Errno::ENOTDIR => Code::NotADirectory,
            Errno::EISDIR => Code::IsADirectory,
            Errno::ENOTEMPTY => Code::NotEmpty,
            Errno::EACCES | Errno::EPERM | Errno::EROFS => Code::PermissionDenied,
            Errno::ENOSPC | Errno::EDQUOT => Code::NoSpace,
            Errno::EFBIG | Errno::E2BIG => Code::TooLarge,
            Errno::EMFILE | Errno::ENFILE | Errno::EAGAIN | Errno::ENOMEM => Code::TooMany,
            Errno::ENAMETOOLONG | Errno::ELOOP | Errno::EINVAL => Code::InvalidPath,
            Errno::ENXIO | Errno::ENODEV => Code::NotRegular,
            Errno::ESRCH => Code::NoSuchProcess,
            _ => Code::IoError,
        };
        Self::new(code, format!("{what}: {}", errno.desc()))
    }

    pub fn of_io(error: &std::io::Error, what: &str) -> Self {
        match error.raw_os_error() {
            Some(number) => Self::of_errno(Errno::from_raw(number), what),
            None => Self::new(Code::IoError, format!("{what}: {error}")),
        }
    }

    /// Payload of the `ERROR` frame.
    pub fn to_json(&self) -> Vec<u8> {
        json!({"code": self.code.as_str(), "message": self.message}).to_string().into_bytes()
    }
}
