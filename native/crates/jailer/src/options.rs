//! What the program is told: see the usage at the top of `main`.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Control groups to join, by their directories.
    pub groups: Vec<PathBuf>,
    /// How many descriptors were given, standard streams included. Any further ones are closed.
    pub descriptors: i32,
    /// Descriptor of the network namespace.
    pub network: i32,
    /// Descriptor on which a byte says that `/proc` may go.
    pub proc_until: i32,
    pub program: PathBuf,
    /// With the name that the program is to have.
    pub arguments: Vec<CString>,
}

impl Options {
    /// Read the arguments, without the name of this program.
    pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut arguments = arguments;
        let (mut groups, mut descriptors, mut network, mut proc_until) = (Vec::new(), None, None, None);
        let program = loop {
            let argument = arguments.next().ok_or("no program")?;
            let bytes = argument.into_vec();
            let text = String::from_utf8_lossy(&bytes);
            if let Some(group) = bytes.strip_prefix(b"--group=") {
                groups.push(PathBuf::from(OsString::from_vec(group.to_vec())));
            } else if let Some(number) = text.strip_prefix("--descriptors=") {
                descriptors = Some(descriptor(number)?);
            } else if let Some(number) = text.strip_prefix("--network=") {
                network = Some(descriptor(number)?);
            } else if let Some(number) = text.strip_prefix("--proc-until=") {
                proc_until = Some(descriptor(number)?);
            } else if text.starts_with('-') {
                return Err(format!("unknown option {text}"));
            } else {
                break PathBuf::from(OsString::from_vec(bytes));
            }
        };
        let arguments: Vec<CString> = arguments
            .map(|argument| CString::new(argument.into_vec()).expect("an argument has no zero byte"))
            .collect();
        if arguments.is_empty() {
            return Err("no name for the program".into());
        }
        let descriptors = descriptors.ok_or("no --descriptors")?;
        let (network, proc_until) = (network.ok_or("no --network")?, proc_until.ok_or("no --proc-until")?);
        Ok(Self { groups, descriptors, network, proc_until, program, arguments })
    }
}

fn descriptor(number: &str) -> Result<i32, String> {
    number.parse().ok().filter(|&number| number > 2).ok_or_else(|| format!("{number:?} is no descriptor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn all_of_it() {
        let options =
            parse("--group=/a --group=/b --descriptors=9 --network=7 --proc-until=8 /bin/runsc name --log boot")
                .unwrap();
        assert_eq!(options.groups, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!((options.descriptors, options.network, options.proc_until), (9, 7, 8));
        assert_eq!(options.program, PathBuf::from("/bin/runsc"));
        assert_eq!(options.arguments, [c"name", c"--log", c"boot"].map(ToOwned::to_owned));
    }

    #[test]
    fn what_is_missing_or_wrong_is_said() {
        for (line, message) in [
            ("--network=7 --proc-until=8", "no program"),
            ("--network=7 --proc-until=8 /bin/runsc", "no name for the program"),
            ("--descriptors=9 --network=7 /bin/runsc name", "no --proc-until"),
            ("--descriptors=9 --proc-until=7 /bin/runsc name", "no --network"),
            ("--network=7 --proc-until=8 /bin/runsc name", "no --descriptors"),
            ("--network=x --proc-until=8 /bin/runsc name", "\"x\" is no descriptor"),
            ("--network=2 --proc-until=8 /bin/runsc name", "\"2\" is no descriptor"),
            ("--chroot=/ /bin/runsc name", "unknown option --chroot=/"),
        ] {
            assert_eq!(parse(line).unwrap_err(), message);
        }
    }
}
