//! The file tree of the sandbox's kernel: nothing but a time zone, and `/proc` while it starts.

use std::fs;
use std::io::Read;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use crate::{Step, call_unsafe, to};

/// Where the tree is put together. What lies there stays visible to everybody else.
const SITE: &str = "/tmp";
const NOTHING: Option<&str> = None;

/// Leave the host's tree for an empty one.
pub fn enter() -> Step {
    let harmless = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let site = Path::new(SITE);
    let alone = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(NOTHING, "/", NOTHING, alone, NOTHING).map_err(to("keep mounts from the host"))?;
    mount(Some("jail"), site, Some("tmpfs"), harmless, Some("mode=755,size=1m")).map_err(to("mount a root"))?;

    let proc = site.join("proc");
    for directory in [&site.join("etc"), &proc] {
        fs::create_dir(directory).map_err(|error| ("fill the root", error))?;
    }
    // A host without one counts in UTC, and so does the sandbox.
    if let Ok(zone) = fs::read("/etc/localtime") {
        fs::write(site.join("etc/localtime"), zone).map_err(|error| ("fill the root", error))?;
    }
    mount(Some("/proc"), &proc, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING).map_err(to("bind /proc"))?;
    call_unsafe::make_read_only(site).map_err(|error| ("make the root read-only", error))?;

    chdir(site).map_err(to("enter the root"))?;
    // The host's tree comes to lie over the new one, from where it can be taken away.
    pivot_root(".", ".").map_err(to("enter the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(to("leave the host's tree"))
}

/// Leave a child behind that unmounts `/proc` when told to. The sandbox's kernel tells it, and waits for its end.
pub fn unmount_proc_after(signal: i32) -> Step {
    call_unsafe::fork(move || {
        call_unsafe::close_all_but(signal);
        let is_told = call_unsafe::file(signal).read_exact(&mut [0]).is_ok();
        // Without the word, the kernel has ended.
        i32::from(is_told && umount2("/proc", MntFlags::MNT_DETACH).is_err())
    })
    .map_err(to("fork"))?;
    call_unsafe::close(signal);
    Ok(())
}
