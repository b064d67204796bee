//! The appliance as a process: real members on loopback addresses, fed through their ingest rings
//! and read through their shared memory. `tests/run` runs this once in each mode of sending. What
//! does not depend on the mode is in `usage.rs`.

mod common;
#[path = "appliance/garbage.rs"]
mod garbage;
#[path = "appliance/inspecting.rs"]
mod inspecting;
#[path = "appliance/joining.rs"]
mod joining;
#[path = "appliance/links.rs"]
mod links;
#[path = "appliance/pair.rs"]
mod pair;
