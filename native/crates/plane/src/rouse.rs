//! Waking a frozen sandbox by the shortest way: hostd is asked at once, and its word stands until the record follows.
//!
//! ```text
//! worker: first knock at a frozen sandbox ──machine.resume──▶ hostd ──it runs where its record says──▶ roused: all pass
//!                                                               └───── anything else ─────▶ the API is asked
//! ```
//!
//! The API hears of the change from hostd, as it does when a command wakes a machine, and pushes the record. What it has
//! to judge, a wake that fails or leads elsewhere, is left to it: see [`crate::wake`].

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;

use crate::streams::machine::Link;
use crate::table::Sandbox;
use crate::wake::Wake;

/// For hostd's answer. A thaw takes a millisecond, and a hostd that is too busy for one is so whoever asks.
const PATIENCE: Duration = Duration::from_secs(10);

/// A frozen sandbox as its record has it.
pub struct Sleeper {
    id: Box<str>,
    v: u64,
    address: IpAddr,
    wake: Arc<Wake>,
}

impl Sleeper {
    /// The sandbox of a record.
    pub fn of(sandbox: &Sandbox) -> Self {
        let (id, wake) = (sandbox.id.clone(), Arc::clone(&sandbox.wake));
        Self { id, v: sandbox.v, address: sandbox.address, wake }
    }

    /// Has hostd let it run; lets everybody who waits pass if it does, where its record says.
    /// If not, the id is given back: somebody else is to be asked.
    pub async fn rouse(self, hostd: &Path) -> Result<(), Box<str>> {
        match timeout(PATIENCE, self.resume(hostd)).await {
            Ok(Some(address)) if address == self.address => {
                self.wake.rouse(self.v);
                Ok(())
            }
            _ => Err(self.id),
        }
    }

    /// Where it runs now, if it does.
    async fn resume(&self, hostd: &Path) -> Option<IpAddr> {
        let op = json!({"op": "machine.resume", "id": self.id}).to_string();
        let machine = Link::open(hostd, op.as_bytes()).await.ok()?.reply().await.ok()?;
        let address = machine.get("address")?.as_str()?;
        (machine.get("state")? == "running").then(|| address.parse().ok())?
    }
}
