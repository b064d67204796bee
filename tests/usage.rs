//! How the appliance meets its users: bad input, signals, events, two members with one number,
//! members that do not hear each other, sync links that come and go, sysctls and stock Wireshark.
//! Nothing here depends on how datagrams are sent.

#[path = "usage/bad_input.rs"]
mod bad_input;
#[path = "usage/blocked.rs"]
mod blocked;
mod common;
#[path = "usage/events.rs"]
mod events;
#[path = "usage/link.rs"]
mod link;
#[path = "usage/overload.rs"]
mod overload;
#[path = "usage/rules.rs"]
mod rules;
#[path = "usage/sysctls.rs"]
mod sysctls;
#[path = "usage/tshark.rs"]
mod tshark;
