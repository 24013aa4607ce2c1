//! Programs of the sandbox that run around snapshots, restores and pauses: which there are for a stage.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::Deserialize;

use crate::error::{OpError, OpResult};

/// Where they lie: `<stage>` is a program, or a directory whose programs run in the order of their names.
pub const DIRECTORY: &str = "/etc/sandgate/hooks.d";
const EXECUTABLE: u32 = 0o111;

/// When hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    BeforeSnapshot,
    AfterRestore,
    BeforePause,
    AfterResume,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BeforeSnapshot => "before-snapshot",
            Self::AfterRestore => "after-restore",
            Self::BeforePause => "before-pause",
            Self::AfterResume => "after-resume",
        }
    }
}

/// The programs of a stage, in order; none is the common case. In a directory, what cannot be executed is no hook.
pub fn find(directory: &Path, stage: Stage) -> OpResult<Vec<String>> {
    let place = directory.join(stage.as_str());
    let Ok(meta) = fs::metadata(&place) else { return Ok(Vec::new()) };
    if !meta.is_dir() {
        return Ok(vec![place.to_string_lossy().into_owned()]);
    }
    let entries = fs::read_dir(&place).map_err(|error| OpError::of_io(&error, &place.to_string_lossy()))?;
    let mut paths: Vec<String> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & EXECUTABLE != 0)
        })
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    paths.sort_unstable();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_a_program_or_a_directory_of_programs() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        assert_eq!(find(dir.path(), Stage::AfterRestore).unwrap(), Vec::<String>::new());
        fs::write(path("after-restore"), "").unwrap();
        assert_eq!(find(dir.path(), Stage::AfterRestore).unwrap(), [path("after-restore").to_str().unwrap()]);
        fs::create_dir(path("before-pause")).unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o700), ("README", 0o644)] {
            let file = path("before-pause").join(name);
            fs::write(&file, "").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        }
        let names = ["before-pause/10-a", "before-pause/20-b"].map(|name| path(name).to_str().unwrap().to_owned());
        assert_eq!(find(dir.path(), Stage::BeforePause).unwrap(), names);
    }
}
