/* The exponential function, without branches, so that loops over it become vector instructions.
 *
 * exp(x) = 2^n exp(r) with n = round(x / log 2), |r| <= log(2) / 2, and a polynomial for exp(r). Adding 1.5 * 2^23 (or
 * 2^52) to a number rounds it to an integer, which is then in the lowest bits of the sum. Results below the smallest
 * normal number are 0. A NaN stays one. x must be below log 2^127 (or log 2^1023). */

/* The error is below 1.1 units in the last place. The polynomial is that of Cephes' expf (Moshier). */
static inline TD_INLINE float td_expf(float x) {
    const float shifted = x * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    const float r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    const float power = td_float((td_float_bits(shifted) << 23) + 0x3f800000u);
    return td_float(td_float_bits(p * power) & ((uint32_t)(x < -0x1.5d58ap6f) - 1u));
}

/* The polynomial is Taylor's, whose error here is below 2^-57. */
static inline TD_INLINE double td_exp(double x) {
    const double shifted = x * 0x1.71547652b82fep0 + 0x1.8p52, n = shifted - 0x1.8p52;
    const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = (p * r) * r + r + 1.0;
    const double power = td_double((td_double_bits(shifted) << 52) + 0x3ff0000000000000u);
    return td_double(td_double_bits(p * power) & ((uint64_t)(x < -0x1.6232bdd7abcd2p9) - 1u));
}
