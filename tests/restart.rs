//! Restarts of whole processes: what a member takes up again, when it begins anew, and what its
//! peers notice.

#[path = "restart/announced.rs"]
mod announced;
mod common;
#[path = "restart/killed.rs"]
mod killed;
#[path = "restart/load.rs"]
mod load;
#[path = "restart/tables.rs"]
mod tables;
