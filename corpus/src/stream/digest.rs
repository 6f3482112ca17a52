//! A digest of a batch's rows that ranks make together: each adds its rows, in whatever order, and the sum is the same for
//! any number of ranks. For comparing runs by eye, not against forgery.

use std::fmt;

use crate::stream::Row;

/// The sum of the rows' own digests, which depend on the row's number too. Each limb is a whole number below 2⁵³ for up to
/// two million rows, so that sums of f64 hold it exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowsDigest([f64; 4]);

impl RowsDigest {
    pub const LIMBS: usize = 4;

    /// Adds the row with number `index`.
    pub fn add(&mut self, index: u64, row: &Row) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&index.to_le_bytes());
        let bytes: Vec<u8> = row.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        hasher.update(&bytes);
        hasher.update(&row.is_target.iter().map(|target| u8::from(*target)).collect::<Vec<_>>());
        let digest = hasher.finalize();
        for (sum, limb) in self.0.iter_mut().zip(digest.as_bytes().chunks_exact(4)) {
            *sum += f64::from(u32::from_le_bytes(limb.try_into().expect("four bytes")));
        }
    }

    /// What to sum over ranks.
    pub fn limbs(&self) -> [f64; Self::LIMBS] {
        self.0
    }

    /// Back from the sums.
    pub fn from_limbs(limbs: [f64; Self::LIMBS]) -> RowsDigest {
        RowsDigest(limbs)
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for RowsDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|limb| write!(f, "{:08x}", *limb as u64 as u32))
    }
}
