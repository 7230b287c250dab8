/* The logarithm, sine and cosine that the method of Box and Muller needs, made of +, -, *, / and sqrt alone.
 *
 * IEEE 754 says how those are rounded, so every backend that applies them in this order has the same bits. The log and
 * cos of libraries differ from machine to machine. */

/* Returns ln u for a normal u > 0: u = m 2^e with m in (sqrt(1/2), sqrt(2)], and ln m = 2 artanh((m - 1) / (m + 1)). */
static inline TD_INLINE double td_log(double u) {
    uint64_t bits = td_double_bits(u);
    double m = td_double((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u);
    double e = (double)((int32_t)(bits >> 52) - 1023);
    double halve = m > 0x1.6a09e667f3bcdp+0 ? 1.0 : 0.0;
    m = m * (1.0 - 0.5 * halve);
    e = e + halve;
    double f = (m - 1.0) / (m + 1.0), s = f * f, sum = 1.0 / 21.0;
    sum = sum * s + 1.0 / 19.0;
    sum = sum * s + 1.0 / 17.0;
    sum = sum * s + 1.0 / 15.0;
    sum = sum * s + 1.0 / 13.0;
    sum = sum * s + 1.0 / 11.0;
    sum = sum * s + 1.0 / 9.0;
    sum = sum * s + 1.0 / 7.0;
    sum = sum * s + 1.0 / 5.0;
    sum = sum * s + 1.0 / 3.0;
    sum = sum * s + 1.0;
    return e * 0x1.62e42fefa39efp-1 + (2.0 * f) * sum;
}

/* Turns a 32-bit word into an angle: two bits name the quadrant, and thirty the distance from the middle of it. */
static inline TD_INLINE void td_circle(uint32_t word, double *cosine, double *sine) {
    uint32_t quadrant = word >> 30;
    double a = ((double)(int32_t)(word & 0x3fffffffu) - 536870911.5) * (0x1.921fb54442d18p+0 * 0x1p-30), t = a * a;
    double c = 1.0 / 20922789888000.0, s = 1.0 / 355687428096000.0;
    c = c * t - 1.0 / 87178291200.0;
    c = c * t + 1.0 / 479001600.0;
    c = c * t - 1.0 / 3628800.0;
    c = c * t + 1.0 / 40320.0;
    c = c * t - 1.0 / 720.0;
    c = c * t + 1.0 / 24.0;
    c = c * t - 1.0 / 2.0;
    c = c * t + 1.0;
    s = s * t - 1.0 / 1307674368000.0;
    s = s * t + 1.0 / 6227020800.0;
    s = s * t - 1.0 / 39916800.0;
    s = s * t + 1.0 / 362880.0;
    s = s * t - 1.0 / 5040.0;
    s = s * t + 1.0 / 120.0;
    s = s * t - 1.0 / 6.0;
    s = s * t + 1.0;
    s = s * a;
    double x = (quadrant & 1u) ? s : c, y = (quadrant & 1u) ? c : s;
    *cosine = (quadrant == 1u || quadrant == 2u) ? -x : x;
    *sine = (quadrant >= 2u) ? -y : y;
}
