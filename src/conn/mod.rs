//! Connections: their names (tuples, coordinates), their values, and the table they live in.

pub mod coordinate;
pub mod extra;
pub mod extras;
pub mod index;
pub mod phase;
pub mod slot;
pub mod table;
pub mod tuple;

pub use coordinate::{Coordinate, Generation, MemberId};
pub use extra::Extra;
pub use phase::Phase;
pub use slot::{Connection, Kind, Slot, Stamp, State};
pub use tuple::{Family, Tuple, shard_of};
