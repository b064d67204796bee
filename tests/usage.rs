//! How the appliance meets its users: bad input, signals, events, two members with one number, and
//! stock Wireshark. Nothing here depends on how datagrams are sent.

#[path = "usage/bad_input.rs"]
mod bad_input;
mod common;
#[path = "usage/events.rs"]
mod events;
#[path = "usage/tshark.rs"]
mod tshark;
