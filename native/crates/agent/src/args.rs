//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::hooks;

const USAGE: &str = "\
usage: sandgate-agent [--listen ADDRESS:PORT] [--print-port] [--hooks DIRECTORY] [--no-oom-score]

Runs inside a sandbox, usually as PID 1, and serves its host. The connection token is taken from the
environment variable SANDGATE_AGENT_TOKEN.

  --listen ADDRESS:PORT  where to listen (default 0.0.0.0:10700; port 0 picks a free one)
  --print-port           print the port once listening
  --hooks DIRECTORY      programs to run around snapshots and pauses (default /etc/sandgate/hooks.d)
  --no-oom-score         leave /proc/<pid>/oom_score_adj alone: this kernel ends no single process
  --version              print the version
  --help                 print this
";

#[derive(Debug, PartialEq, Eq)]
pub struct Args {
    pub listen: SocketAddr,
    pub print_port: bool,
    pub hooks: PathBuf,
    pub no_oom_score: bool,
}

/// Why there is nothing to serve.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// Print this and leave successfully.
    Answer(String),
    /// Print this and leave with an error.
    Mistake(String),
}

impl Args {
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, Stop> {
        let mut parsed = Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 10_700)),
            print_port: false,
            hooks: PathBuf::from(hooks::DIRECTORY),
            no_oom_score: false,
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--listen" => {
                    let value = arguments.next().unwrap_or_default();
                    let mistake = |_| Stop::Mistake(format!("--listen {value:?}: not an address with a port"));
                    parsed.listen = value.parse().map_err(mistake)?;
                }
                "--print-port" => parsed.print_port = true,
                "--no-oom-score" => parsed.no_oom_score = true,
                "--hooks" => match arguments.next() {
                    Some(directory) if !directory.is_empty() => parsed.hooks = directory.into(),
                    _ => return Err(Stop::Mistake("--hooks: a directory is missing".to_owned())),
                },
                "--version" => return Err(Stop::Answer(format!("sandgate-agent {}\n", env!("CARGO_PKG_VERSION")))),
                "--help" | "-h" => return Err(Stop::Answer(USAGE.to_owned())),
                other => return Err(Stop::Mistake(format!("unknown argument {other:?}\n{USAGE}"))),
            }
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Stop> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn defaults_are_those_of_a_sandbox() {
        let args = parse("").unwrap();
        assert_eq!((args.listen.to_string().as_str(), args.print_port), ("0.0.0.0:10700", false));
    }

    #[test]
    fn mistakes_are_told() {
        assert_eq!(parse("--listen 127.0.0.1:0 --print-port").unwrap().listen.port(), 0);
        assert!(matches!(parse("--listen"), Err(Stop::Mistake(_))));
        assert!(matches!(parse("--listen here"), Err(Stop::Mistake(_))));
        assert_eq!(parse("--hooks /x").unwrap().hooks, PathBuf::from("/x"));
        assert!(matches!(parse("--hooks"), Err(Stop::Mistake(_))));
        assert!(parse("--no-oom-score").unwrap().no_oom_score);
        assert!(matches!(parse("--frobnicate"), Err(Stop::Mistake(_))));
        assert!(matches!(parse("--help"), Err(Stop::Answer(_))));
    }
}
