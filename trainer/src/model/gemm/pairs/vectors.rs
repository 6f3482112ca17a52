//! Vectors of pairs of bf16, as the kernels of this room use them.

use std::arch::x86_64::*;
use std::mem::transmute;

/// `sum` + a · b, pair by pair.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn multiply(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: bits are bits.
    unsafe {
        _mm512_dpbf16_ps(
            sum,
            transmute::<__m512i, __m512bh>(a),
            transmute::<__m512i, __m512bh>(b),
        )
    }
}

/// Two vectors rounded to bf16, to nearest and ties to even, one behind the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn rounded(first: __m512, second: __m512) -> __m512i {
    // SAFETY: bits are bits.
    unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// One vector rounded to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn half(x: __m512) -> __m256i {
    // SAFETY: bits are bits.
    unsafe { transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) }
}

/// Two vectors rounded to bf16, their values by turns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn zipped(first: __m512, second: __m512) -> __m512i {
    const WORDS: [u16; 32] = {
        let mut words = [0; 32];
        let mut index = 0;
        while index < 32 {
            words[index] = (index / 2 + index % 2 * 16) as u16;
            index += 1;
        }
        words
    };
    // SAFETY: as many words as a vector has.
    let words = unsafe { _mm512_loadu_si512(WORDS.as_ptr().cast()) };
    _mm512_permutexvar_epi16(words, rounded(first, second))
}

/// Which of `LANES` lanes from `at` on come before `end`, the lowest bit for the first.
#[inline]
pub fn before<const LANES: usize>(end: usize, at: usize) -> u32 {
    match end.saturating_sub(at) {
        0 => 0,
        left if left < LANES => (1 << left) - 1,
        _ => !0 >> (32 - LANES),
    }
}
