/* The loss on a CPU, in float32: row operations with the same passes, records and formulas as ../gpu/divergence.py, and
 * the matrix products around them (cpu_products.h).
 *
 * Logits are (rows, tokens): a row for each vocabulary entry of a tile, with `width` columns of the student's and as
 * many of the teacher's after them, `stride` floats from row to row. `fold` makes a block of rows and folds it into
 * running softmax sums while it is in the cache; `fold_mixture` reads the tile again where log(p/m) needs the finished
 * sums; `carry_back` makes the gradient, a block of rows at a time, and multiplies it with hidden states and head.
 * Cross-entropy has no teacher: there are the student's columns alone, and scores of one model start as it does.
 *
 * Threads are those of the OpenMP that torch has loaded: this file is linked to none of its own. Each has its share of
 * a tile's rows and its own records, in float64, FIELDS for each token, which Python adds up.
 *
 * Loops over tokens are what the compiler vectorises, one version for each of the instruction sets below.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A version for each kind of processor, chosen when the library is loaded. Before GCC 12 the newer names do not do. To
 * measure one kind on another, name it when compiling: -DPRODUCTS=products_avx2 -DROW_TARGET=arch=x86-64-v3. */
#define QUOTED(...) #__VA_ARGS__
#define QUOTED_VALUE(...) QUOTED(__VA_ARGS__)
#ifdef ROW_TARGET
#define EACH_PROCESSOR __attribute__((target(QUOTED_VALUE(ROW_TARGET))))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

/* Tokens and vocabulary entries that row operations take at once: two models' logits of so many are 14 KiB. */
enum { TOKENS = 64, ENTRIES = 28 };

enum divergence { REVERSE_KL, FORWARD_KL, JSD, SKEW_REVERSE_KL, SKEW_FORWARD_KL, CROSS_ENTROPY };

/* A record: for each token its largest u, sum e and sum e z, with z = factor (u - largest) and e = exp(z), of the
 * student; the same of the teacher; the divergence's own sum, which is that of u for cross-entropy; the teacher's u where
 * the student's is largest; the sum of a hard term's own e. */
enum field { PEAK, SUM, DOT, TEACHER_PEAK, TEACHER_SUM, TEACHER_DOT, CROSS, TEACHER_AT_PEAK, HARD_SUM, FIELDS };

/* What a token's gradient needs: both largest u and the teacher's at the student's; weights of exp(z) for both models;
 * the centre. Of a mixture where the student's logit is largest also log p - log q, the teacher's share of it, what
 * that lacks to 1, and its logarithm. Of cross-entropy the weight of z, and what each entry's gradient lacks. Of a hard
 * term the weight of its own exp(z). */
enum constant {
    A,
    B,
    C,
    P_FACTOR,
    Q_FACTOR,
    CENTRE,
    PEAK_RATIO,
    SHARE,
    REST,
    LOG_SHARE,
    SLOPE,
    UNIFORM,
    HARD_FACTOR,
    CONSTANTS
};

/* The teacher's part of a mixture, the student's, and their quotient, each with all its digits. */
struct mixture {
    float beta, rest, odds;
};

static struct mixture mixture_of(double beta) {
    return (struct mixture){(float)beta, (float)(1 - beta), (float)(beta / (1 - beta))};
}

/* How logits come from products y, to which the bias is added first: factor u, where u = inner y, or tanh(inner y) under
 * a soft cap, and factor > 0. Those of a hard term at another temperature are hard_ratio times as large; else that is 0.
 *
 * Kernels take differences of u before they multiply: two numbers side by side lose nothing then, and what is the
 * largest is exactly 0. A difference of products would be rounded as the largest of them is, or half of it where the
 * compiler makes one instruction of a product and a sum: differently in each pass. */
struct options {
    const float *bias;
    float factor, inner, hard_ratio;
    int32_t capped;
};

/* ---- Elementary functions, accurate to float32's last digits ---- */

INLINE float from_bits(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t to_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* exp for x <= 88; 0 below -86, before numbers that lack digits, which are slow. */
INLINE float exponential(float x) {
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest whole number in the lowest bits */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    y = from_bits((int32_t)((uint32_t)to_bits(y) + ((uint32_t)to_bits(shifted) << 23)));
    return x < -86.0f ? 0 : y;
}

/* log for positive numbers that have all their digits; what is not a number stays so. */
INLINE float logarithm(float x) {
    int32_t bits = to_bits(x) - 0x3f3504f3; /* from sqrt(1/2): so much more than a power of two */
    float n = (float)(bits >> 23);
    float r = from_bits((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    float y = 7.0376836292e-2f;
    y = y * r - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    y = y * (r * r * r) - n * 2.12194440e-4f - 0.5f * r * r;
    return x == x ? r + y + n * 0.693359375f : x;
}

/* By its series near 0, where the quotient would lose digits. */
INLINE float hyperbolic_tangent(float x) {
    float y = x * x, size = fabsf(x);
    float series = x * (1 + y * (-1.0f / 3 + y * (2.0f / 15 + y * (-17.0f / 315 + y * (62.0f / 2835)))));
    float quotient = 1 - 2 / (exponential(2 * (size > 20 ? 20 : size)) + 1);
    return size < 0.3f ? series : (x < 0 ? -quotient : quotient);
}

/* log(1 + y) by the series of artanh near 0, where `sum`, 1 + y, would lose digits. */
INLINE float logarithm_near_1(float y, float sum) {
    float s = y / (2 + y), t = s * s;
    float series = 2 * s * (1 + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9)))));
    float plain = logarithm(sum);
    return fabsf(y) < 0.4f ? series : plain;
}

/* share (exp(x) - 1), by its series near 0, where the difference would lose digits; `power` is share exp(x). */
INLINE float share_of_exponential_minus_1(float x, float share, float power) {
    float series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))));
    float near = share * series, far = power - share;
    return fabsf(x) < 0.3f ? near : far;
}

/* ---- Formulas of divergences.py for one logit ---- */

/* u of a masked entry, where there is no soft cap. */
static const float MASKED = -0x1p100f;

/* Log-ratios are bounded so that their exponentials are finite. */
INLINE float bounded(float log_ratio) {
    log_ratio = log_ratio > 80.0f ? 80.0f : log_ratio;
    return log_ratio < -80.0f ? -80.0f : log_ratio;
}

/* log(one / m) from log(other / one), where the mixture m holds `share` of the other and `rest` of the one. */
INLINE float log_over_mixture(float other_over_one, float share, float rest) {
    float power = share * exponential(other_over_one);
    return -logarithm_near_1(share_of_exponential_minus_1(other_over_one, share, power), rest + power);
}

/* g less its value at the peak, where dL/dz = p (g - sum p g), from q/p over that at the peak, a logarithm. */
INLINE float mixture_score(float change, float share, float rest, float log_share, const struct mixture *mixture,
                           enum divergence divergence) {
    float exponent = log_share + change;
    exponent = exponent > 80.0f ? 80.0f : exponent;
    float power = exponential(exponent);
    float y = share_of_exponential_minus_1(change, share, power), sum = rest + power;
    if (divergence == JSD)
        return -mixture->rest * logarithm_near_1(y, sum);
    if (divergence == SKEW_FORWARD_KL)
        return -rest / mixture->odds * (y / sum);
    float s = y / (2 + y), t = s * s;
    float tail = 2 * s * t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
    float series = -2 * t / (1 + s) - tail - share * (y / sum);
    float plain = rest * (y / sum) - logarithm(sum);
    return fabsf(y) < 0.4f ? series : plain;
}

/* ---- Tiles ---- */

struct block {
    float z[ENTRIES][TOKENS];
};

/* Whether u is something else than the product. */
INLINE int differs(const struct options *options) {
    return options->bias || options->capped || options->inner != 1;
}

/* u of up to ENTRIES rows and TOKENS columns of products, over which it is written, so that later passes do with it. */
INLINE void load(float *products, long stride, int rows, int tokens, const struct options *options,
                 struct block *block) {
    int finish = differs(options);
    for (int r = 0; r < rows; r++, products += stride) {
        if (finish) {
            float bias = options->bias ? options->bias[r] : 0;
            for (int j = 0; j < tokens; j++)
                products[j] = (products[j] + bias) * options->inner;
            if (options->capped)
                for (int j = 0; j < tokens; j++)
                    products[j] = products[j] == -INFINITY ? MASKED : hyperbolic_tangent(products[j]);
        }
        for (int j = 0; j < tokens; j++)
            block->z[r][j] = products[j];
    }
}

/* The largest of each token's u so far, from `peak` on, and what `other` holds there. */
INLINE void largest(const struct block *z, const struct block *other, int rows, int tokens, float *peak, float *at) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < tokens; j++) {
            int above = z->z[r][j] > peak[j];
            at[j] = above ? other->z[r][j] : at[j];
            peak[j] = above ? z->z[r][j] : peak[j];
        }
}

/* z from u, in place, its exponentials, and sum and dot of these added to the record's. */
INLINE void add_exponentials(struct block *z, struct block *e, int rows, int tokens, const float *peak, float factor,
                             double *sum, double *dot) {
    float sums[TOKENS] = {0}, dots[TOKENS] = {0};
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < tokens; j++) {
            z->z[r][j] = (z->z[r][j] - peak[j]) * factor;
            e->z[r][j] = exponential(z->z[r][j]);
            sums[j] += e->z[r][j];
            dots[j] += e->z[r][j] * z->z[r][j];
        }
    for (int j = 0; j < tokens; j++) {
        sum[j] += sums[j];
        dot[j] += dots[j];
    }
}

/* Of a hard term's own z to its sum. */
INLINE void add_hard_exponentials(const struct block *z, int rows, int tokens, float ratio, double *sum) {
    float sums[TOKENS] = {0};
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < tokens; j++)
            sums[j] += exponential(z->z[r][j] * ratio);
    for (int j = 0; j < tokens; j++)
        sum[j] += sums[j];
}

/* How far the old largest logit lies above the new one; before the first there are no sums to move. */
static double shift_of(double old, float peak, float factor) { return old == -INFINITY ? 0 : factor * (old - peak); }

/* A sum e g after what e is relative to has moved by `shift`, and each g has grown by `offset`. */
static double rebased(double sum, double moment, double shift, double offset) {
    return exp(shift) * (moment + offset * sum);
}

/* A record's sums relative to new largest logits, which few blocks bring. */
static void move_record(double *record, long width, const struct options *student, const struct options *teacher,
                        enum divergence divergence, float a, float b, float c) {
    double *field[FIELDS];
    for (int i = 0; i < FIELDS; i++)
        field[i] = record + i * width;
    double shift = shift_of(*field[PEAK], a, student->factor);
    double teacher_shift = shift_of(*field[TEACHER_PEAK], b, teacher->factor);
    if (divergence == REVERSE_KL)
        *field[CROSS] = rebased(*field[SUM], *field[CROSS], shift,
                              shift - teacher->factor * (*field[TEACHER_AT_PEAK] - c));
    if (divergence == FORWARD_KL)
        *field[CROSS] = rebased(*field[TEACHER_SUM], *field[CROSS], teacher_shift, teacher_shift - shift);
    *field[DOT] = rebased(*field[SUM], *field[DOT], shift, shift);
    *field[SUM] *= exp(shift);
    *field[HARD_SUM] *= exp(shift * student->hard_ratio);
    *field[TEACHER_DOT] = rebased(*field[TEACHER_SUM], *field[TEACHER_DOT], teacher_shift, teacher_shift);
    *field[TEACHER_SUM] *= exp(teacher_shift);
    *field[PEAK] = a;
    *field[TEACHER_PEAK] = b;
    *field[TEACHER_AT_PEAK] = c;
}

INLINE int least(long a, long b) { return (int)(a < b ? a : b); }

/* Of up to ENTRIES rows and TOKENS tokens; `record` is that of the first of these. */
INLINE void fold_pair_block(float *logits, int rows, long stride, int tokens, long width, const struct options *student,
                            const struct options *teacher, enum divergence divergence, double *record) {
    struct block s, t, e;
    float a[TOKENS], b[TOKENS], c[TOKENS], unused[TOKENS] = {0}, cross[TOKENS] = {0};
    load(logits, stride, rows, tokens, student, &s);
    load(logits + width, stride, rows, tokens, teacher, &t);
    for (int j = 0; j < tokens; j++) {
        a[j] = (float)record[PEAK * width + j];
        b[j] = (float)record[TEACHER_PEAK * width + j];
        c[j] = (float)record[TEACHER_AT_PEAK * width + j];
    }
    largest(&s, &t, rows, tokens, a, c);
    largest(&t, &t, rows, tokens, b, unused);
    for (int j = 0; j < tokens; j++)
        if (a[j] > record[PEAK * width + j] || b[j] > record[TEACHER_PEAK * width + j])
            move_record(record + j, width, student, teacher, divergence, a[j], b[j], c[j]);
    add_exponentials(&s, &e, rows, tokens, a, student->factor, record + SUM * width, record + DOT * width);
    if (divergence == REVERSE_KL)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < tokens; j++)
                cross[j] += e.z[r][j] * (s.z[r][j] - (t.z[r][j] - c[j]) * teacher->factor);
    add_exponentials(&t, &e, rows, tokens, b, teacher->factor, record + TEACHER_SUM * width,
                     record + TEACHER_DOT * width);
    if (divergence == FORWARD_KL)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < tokens; j++)
                cross[j] += e.z[r][j] * (t.z[r][j] - s.z[r][j]);
    for (int j = 0; j < tokens; j++)
        record[CROSS * width + j] += cross[j];
    if (student->hard_ratio != 0)
        add_hard_exponentials(&s, rows, tokens, student->hard_ratio, record + HARD_SUM * width);
}

/* Some rows of a tile for both models; `records` are the thread's own. Whole blocks have loops of known length. */
INLINE void fold_pair_rows(float *logits, long rows, long stride, long width, struct options student,
                           struct options teacher, enum divergence divergence, double *records) {
    for (long row = 0; row < rows; row += ENTRIES, logits += ENTRIES * stride) {
        int count = least(ENTRIES, rows - row);
        for (long first = 0; first < width; first += TOKENS) {
            int tokens = least(TOKENS, width - first);
            if (count == ENTRIES && tokens == TOKENS)
                fold_pair_block(logits + first, ENTRIES, stride, TOKENS, width, &student, &teacher, divergence,
                                records + first);
            else
                fold_pair_block(logits + first, count, stride, tokens, width, &student, &teacher, divergence,
                                records + first);
        }
        student.bias += student.bias ? ENTRIES : 0;
        teacher.bias += teacher.bias ? ENTRIES : 0;
    }
}

/* The same for one model's softmax alone, and the sum of its u. */
INLINE void fold_block(float *logits, int rows, long stride, int tokens, long width, const struct options *options,
                       double *record) {
    struct block z, e;
    double *peak = record + PEAK * width, *sum = record + SUM * width, *dot = record + DOT * width;
    float a[TOKENS], unused[TOKENS] = {0}, all[TOKENS] = {0};
    load(logits, stride, rows, tokens, options, &z);
    for (int j = 0; j < tokens; j++)
        a[j] = (float)peak[j];
    largest(&z, &z, rows, tokens, a, unused);
    for (int j = 0; j < tokens; j++)
        if (a[j] > peak[j]) {
            double shift = shift_of(peak[j], a[j], options->factor);
            dot[j] = rebased(sum[j], dot[j], shift, shift);
            sum[j] *= exp(shift);
            peak[j] = a[j];
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < tokens; j++)
            all[j] += z.z[r][j];
    for (int j = 0; j < tokens; j++)
        record[CROSS * width + j] += all[j];
    add_exponentials(&z, &e, rows, tokens, a, options->factor, sum, dot);
}

INLINE void fold_rows(float *logits, long rows, long stride, long width, struct options options, double *records) {
    for (long row = 0; row < rows; row += ENTRIES, logits += ENTRIES * stride) {
        int count = least(ENTRIES, rows - row);
        for (long first = 0; first < width; first += TOKENS) {
            int tokens = least(TOKENS, width - first);
            if (count == ENTRIES && tokens == TOKENS)
                fold_block(logits + first, ENTRIES, stride, TOKENS, width, &options, records + first);
            else
                fold_block(logits + first, count, stride, tokens, width, &options, records + first);
        }
        options.bias += options.bias ? ENTRIES : 0;
    }
}

/* A mixture's second pass: sum e (g - g at the peak), and the loss's own, sum e log(p/m) for the skewed reverse KL and
 * sum f log(q/m) for the other two, (2, width) added to. */
INLINE void fold_mixture_rows(float *logits, long rows, long stride, long width, struct options student,
                              struct options teacher, enum divergence divergence,
                              const struct mixture *mixture, const float *constants, double *sums) {
    for (long row = 0; row < rows; row += ENTRIES, logits += ENTRIES * stride) {
        int count = least(ENTRIES, rows - row);
        for (long first = 0; first < width; first += TOKENS) {
            int tokens = least(TOKENS, width - first);
            const float *a = constants + A * width + first, *b = constants + B * width + first;
            const float *c = constants + C * width + first, *peak_ratio = constants + PEAK_RATIO * width + first;
            const float *share = constants + SHARE * width + first, *rest = constants + REST * width + first;
            const float *log_share = constants + LOG_SHARE * width + first;
            float scores[TOKENS] = {0}, losses[TOKENS] = {0};
            const float *u = logits + first, *v = u + width;
            for (int r = 0; r < count; r++, u += stride, v += stride)
                for (int j = 0; j < tokens; j++) {
                    float z = (u[j] - a[j]) * student.factor;
                    float ratio = z - (v[j] - c[j]) * teacher.factor, log_ratio = bounded(ratio + peak_ratio[j]);
                    float e = exponential(z);
                    scores[j] += e * mixture_score(-ratio, share[j], rest[j], log_share[j], mixture, divergence);
                    if (divergence == SKEW_REVERSE_KL)
                        losses[j] += e * log_over_mixture(-log_ratio, mixture->beta, mixture->rest);
                    else
                        losses[j] += exponential((v[j] - b[j]) * teacher.factor) *
                                     log_over_mixture(log_ratio, mixture->rest, mixture->beta);
                }
            for (int j = 0; j < tokens; j++) {
                sums[first + j] += scores[j];
                sums[width + first + j] += losses[j];
            }
        }
    }
}

/* The gradient of the student's products, of up to ENTRIES rows and TOKENS tokens; `constants` are the first's. */
INLINE void gradient_block(const float *logits, int rows, long stride, int tokens, long width,
                           const struct options *student, const struct options *teacher, enum divergence divergence,
                           const struct mixture *mixture, const float *constants, float *restrict gradients,
                           long gradient_stride) {
    const float *a = constants + A * width, *b = constants + B * width, *c = constants + C * width;
    const float *p_factor = constants + P_FACTOR * width, *q_factor = constants + Q_FACTOR * width;
    const float *centre = constants + CENTRE * width, *share = constants + SHARE * width;
    const float *rest = constants + REST * width, *log_share = constants + LOG_SHARE * width;
    const float *slope = constants + SLOPE * width, *uniform = constants + UNIFORM * width;
    for (int r = 0; r < rows; r++, logits += stride, gradients += gradient_stride)
        for (int j = 0; j < tokens; j++) {
            float z = (logits[j] - a[j]) * student->factor, other = divergence == CROSS_ENTROPY ? 0 : logits[width + j];
            float p = exponential(z) * p_factor[j], ratio = z - (other - c[j]) * teacher->factor, gradient;
            if (divergence == CROSS_ENTROPY) {
                gradient = p * (z * slope[j] - centre[j]) - uniform[j];
                gradient = logits[j] > MASKED ? gradient : 0;
            }
            else if (divergence == REVERSE_KL)
                gradient = p * (ratio - centre[j]);
            else if (divergence == FORWARD_KL) { /* of the others p makes a masked entry's gradient 0 */
                gradient = p - exponential((other - b[j]) * teacher->factor) * q_factor[j];
                gradient = logits[j] > MASKED ? gradient : 0;
            }
            else
                gradient = p * (mixture_score(-ratio, share[j], rest[j], log_share[j], mixture, divergence) - centre[j]);
            float rise = 1 - logits[j] * logits[j]; /* of the soft cap: 0 where an entry was taken out */
            gradients[j] = student->capped ? gradient * (rise < 0 ? 0 : rise) : gradient;
        }
}

/* The same for all tokens, rows `gradient_stride` apart. */
INLINE void gradient_rows(const float *logits, long rows, long stride, long width, const struct options *student,
                          const struct options *teacher, enum divergence divergence,
                          const struct mixture *mixture, const float *constants, float *gradients, long gradient_stride) {
    for (long row = 0; row < rows; row += ENTRIES, logits += ENTRIES * stride, gradients += ENTRIES * gradient_stride) {
        int count = least(ENTRIES, rows - row);
        for (long first = 0; first < width; first += TOKENS) {
            int tokens = least(TOKENS, width - first);
            if (count == ENTRIES && tokens == TOKENS)
                gradient_block(logits + first, ENTRIES, stride, TOKENS, width, student, teacher, divergence, mixture,
                               constants + first, gradients + first, gradient_stride);
            else
                gradient_block(logits + first, count, stride, tokens, width, student, teacher, divergence, mixture,
                               constants + first, gradients + first, gradient_stride);
        }
    }
}

/* Adds to it the gradient of a hard term that has its own softmax, but for what it lacks at labels. */
INLINE void hard_rows(const float *logits, long rows, long stride, long width, const struct options *student,
                      const float *constants, float *restrict gradients, long gradient_stride) {
    const float *a = constants + A * width, *weight = constants + HARD_FACTOR * width;
    for (long row = 0; row < rows; row++, logits += stride, gradients += gradient_stride)
        for (long j = 0; j < width; j++) {
            float p = exponential((logits[j] - a[j]) * student->factor * student->hard_ratio) * weight[j];
            gradients[j] += student->capped ? p * (1 - logits[j] * logits[j]) : p;
        }
}

/* ---- For each instruction set, and each divergence ---- */

EACH_PROCESSOR void fold_share(float *logits, long rows, long stride, long width, const struct options *student,
                                    const struct options *teacher, enum divergence divergence, double *records) {
#define CASE(name)                                                                                                     \
    case name:                                                                                                         \
        fold_pair_rows(logits, rows, stride, width, *student, *teacher, name, records);                                \
        break
    switch (divergence) {
        CASE(REVERSE_KL);
        CASE(FORWARD_KL);
    case CROSS_ENTROPY:
        fold_rows(logits, rows, stride, width, *student, records);
        break;
    default:
        fold_pair_rows(logits, rows, stride, width, *student, *teacher, JSD, records);
    }
#undef CASE
}

EACH_PROCESSOR void fold_mixture_share(float *logits, long rows, long stride, long width, const struct options *student,
                                       const struct options *teacher, enum divergence divergence,
                                       const struct mixture *mixture, const float *constants, double *sums) {
#define CASE(name)                                                                                                     \
    case name:                                                                                                         \
        fold_mixture_rows(logits, rows, stride, width, *student, *teacher, name, mixture, constants, sums);               \
        break
    switch (divergence) {
        CASE(JSD);
        CASE(SKEW_REVERSE_KL);
        CASE(SKEW_FORWARD_KL);
    default:
        break;
    }
#undef CASE
}

EACH_PROCESSOR void gradient_share(float *logits, long rows, long stride, long width, const struct options *student,
                                   const struct options *teacher, enum divergence divergence,
                                   const struct mixture *mixture, const float *constants, float *gradients, long gradient_stride) {
#define CASE(name)                                                                                                     \
    case name:                                                                                                         \
        gradient_rows(logits, rows, stride, width, student, teacher, name, mixture, constants, gradients,                 \
                      gradient_stride);                                                                                \
        break
    switch (divergence) {
        CASE(REVERSE_KL);
        CASE(FORWARD_KL);
        CASE(JSD);
        CASE(SKEW_REVERSE_KL);
        CASE(SKEW_FORWARD_KL);
        CASE(CROSS_ENTROPY);
    }
#undef CASE
    if (student->hard_ratio != 0)
        hard_rows(logits, rows, stride, width, student, constants, gradients, gradient_stride);
}

/* ---- Matrix products ---- */

/* What products read next: lines of the cache that they ask memory for as they go, of one range and then another. */
struct fetch {
    const char *at, *past, *then, *then_past;
};

INLINE struct fetch fetching(const float *range, long count, const float *then, long then_count) {
    return (struct fetch){(const char *)range, (const char *)(range + count), (const char *)then,
                          (const char *)(then + then_count)};
}

INLINE void fetch_some(struct fetch *fetch) {
    if (fetch->at < fetch->past) {
        __builtin_prefetch(fetch->at, 0, 2);
        __builtin_prefetch(fetch->at + 64, 0, 2);
        fetch->at += 128;
    } else if (fetch->then < fetch->then_past) {
        fetch->at = fetch->then;
        fetch->past = fetch->then = fetch->then_past;
    }
}

/* What makes so many columns of a tile's logits, from column `first` on: panels of (hidden size, panel_columns()) of
 * transposed hidden states one after another, and the head's rows for the tile. */
struct model {
    const float *hidden, *head;
    long first, tokens, hidden_size, head_stride;
};

/* Labels of a tile's columns, the tile's first entry being 0: as many for each column, side by side in rising order, and
 * a number for each. */
struct labels {
    const int64_t *label;
    float *value;
    long each;
};

/* What a tile's gradient is multiplied with, and where that goes; null where it is not wanted. */
struct carry {
    const float *hidden;    /* the student's hidden states, panels of (width, panel_columns()) */
    const float *head;      /* rows for the tile's vocabulary entries */
    float *head_gradient;   /* as many rows, added to, or set to where `add` is 0 */
    float *bias_gradient;   /* added to */
    float *hidden_gradient; /* for each thread as many panels, added to, or set to by a chunk's first tile */
    struct labels target;   /* what the gradient of the labels' logits lacks; null where there are none */
    long hidden_size, head_stride, head_gradient_stride;
    int32_t add, first_tile;
};

/* The products with one set of instructions. */
struct products {
    int rows, columns;
    void (*to_logits)(const struct model *, const float *, long, float *, long, struct fetch *);
    void (*to_head)(const float *, long, long, long, const struct carry *, float *, struct fetch *);
    void (*to_hidden)(const float *, long, long, long, const struct carry *, const float *, float *, int, float *,
                      struct fetch *);
};

/* Hidden entries that a sum of logits takes at once: a panel of so many stays in the nearest cache. */
enum { DEPTH = 192 };

#define LANES 4
#define TILE_ROWS 6
#define SET(name) name##_default
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define TILE_ROWS 6
#define SET(name) name##_avx2
#include "products.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f")
#define LANES 16
#define TILE_ROWS 14
#define SET(name) name##_avx512
#include "products.h"
#pragma GCC pop_options

static const struct products *products(void) {
#ifdef PRODUCTS /* for tests and measurements */
    return &PRODUCTS;
#endif
    if (__builtin_cpu_supports("avx512f"))
        return &products_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &products_avx2 : &products_default;
}

#else

static const struct products *products(void) { return &products_default; }

#endif

/* Vocabulary entries from whose logits to whose products all stays in the cache, whole tiles of them. */
static long block_rows(void) { return 2 * ENTRIES / products()->rows * products()->rows; }

/* Floats from one row of a block's gradient to the next; a power of two would have rows share sets of the cache. */
static long gradient_stride(long width) { return width + 16; }

static float sum_of(const float *values, long count) {
    double sum = 0;
    for (long i = 0; i < count; i++)
        sum += values[i];
    return (float)sum;
}

/* ---- What Python calls: a tile's rows shared out among threads ---- */

static struct options from_row(const struct options *options, long row) {
    struct options moved = *options;
    moved.bias += moved.bias ? row : 0;
    return moved;
}

/* Both models' logits, or one's, of rows from `row` on; meanwhile as many rows of the heads after them are asked for. */
static void make_logits(const struct model *models, int count, long row, long rows, float *logits, long stride) {
    for (const struct model *model = models; model < models + count; model++) {
        const float *head = model->head + row * model->head_stride;
        struct fetch fetch = fetching(head + rows * model->head_stride, rows * model->head_stride, 0, 0);
        products()->to_logits(model, head, rows, logits + model->first, stride, &fetch);
    }
}

/* The first of a column's labels that is not below an entry. */
static long first_label(const int64_t *label, long each, long entry) {
    long first = 0;
    while (first < each) {
        long middle = first + (each - first) / 2;
        if (label[middle] < entry)
            first = middle + 1;
        else
            each = middle;
    }
    return first;
}

/* Moves u at labels out of a block of products from `row` on: of what is left, `load` makes masked entries. */
static void take_out(float *logits, long stride, long row, int count, long width, const struct options *options,
                     const struct labels *out) {
    float masked = (options->capped ? -INFINITY : MASKED) * (options->inner < 0 ? -1 : 1);
    for (long j = 0; j < width; j++) {
        const int64_t *label = out->label + j * out->each;
        for (long k = first_label(label, out->each, row); k < out->each && label[k] < row + count; k++) {
            float *at = logits + (label[k] - row) * stride + j;
            float y = (*at + (options->bias ? options->bias[label[k] - row] : 0)) * options->inner;
            out->value[j * out->each + k] = options->capped ? hyperbolic_tangent(y) : y;
            *at = masked;
        }
    }
}

void fold(float *logits, long rows, long stride, long width, const struct options *student,
          const struct options *teacher, int divergence, double beta, const struct model *models, int count,
          const struct labels *out, double *records, int threads) {
    (void)beta; /* so that all kernels are called alike */
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        long past = rows * (thread + 1) / threads, block = block_rows();
        for (long row = rows * thread / threads; row < past; row += block) {
            struct options own = from_row(student, row), others = from_row(teacher, row);
            int some = least(block, past - row);
            make_logits(models, count, row, some, logits + row * stride, stride);
            if (out->label)
                take_out(logits + row * stride, stride, row, some, width, &own, out);
            fold_share(logits + row * stride, some, stride, width, &own, &others, divergence,
                            records + thread * FIELDS * width);
        }
    }
}

void fold_mixture(float *logits, long rows, long stride, long width, const struct options *student,
                  const struct options *teacher, int divergence, double beta, const float *constants, double *sums,
                  int threads) {
    const struct mixture mixture = mixture_of(beta);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        long first = rows * thread / threads, past = rows * (thread + 1) / threads;
        fold_mixture_share(logits + first * stride, past - first, stride, width, student, teacher, divergence, &mixture,
                           constants, sums + thread * 2 * width);
    }
}

/* How many columns a panel has: tokens in `model`, hidden entries in `carry`. */
int panel_columns(void) { return products()->columns; }

/* Which Python this library is for: a number that is raised with each change of what passes between them, as
 * tests/test_cpu_backend.py makes sure. */
enum { INTERFACE = 4 };

int interface_version(void) { return INTERFACE; }

/* The divergences in the order of their codes. */
const char divergence_names[] = "reverse_kl forward_kl jsd skew_reverse_kl skew_forward_kl cross_entropy";

/* Subtracts the target where a block of rows from `row` on has a column's labels. */
static void subtract_target(float *gradient, long stride, long row, int count, long width, const struct labels *target) {
    for (long j = 0; j < width; j++) {
        const int64_t *label = target->label + j * target->each;
        const float *value = target->value + j * target->each;
        for (long k = first_label(label, target->each, row); k < target->each && label[k] < row + count; k++)
            gradient[(label[k] - row) * stride + j] -= value[k];
    }
}

/* Floats that each thread of `carry_back` works in. */
long carry_back_scratch(long width) { return block_rows() * (gradient_stride(width) + products()->columns); }

void carry_back(float *logits, long rows, long stride, long width, const struct options *student,
                const struct options *teacher, int divergence, double beta, const float *constants,
                const struct carry *carry, float *scratch, int threads) {
    const struct products *set = products();
    const struct mixture mixture = mixture_of(beta);
    long block = block_rows(), step = gradient_stride(width);
    long sums = width * ((carry->hidden_size + set->columns - 1) / set->columns * set->columns);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        long first = rows * thread / threads, past = rows * (thread + 1) / threads;
        float *gradient = scratch + thread * carry_back_scratch(width), *panel = gradient + block * step;
        float *hidden = carry->hidden_gradient ? carry->hidden_gradient + thread * sums : 0;
        if (hidden && carry->first_tile && first == past)
            memset(hidden, 0, sizeof *hidden * sums);
        for (long row = first; row < past; row += block) {
            int count = least(block, past - row);
            const float *head = carry->head + row * carry->head_stride;
            long after = least(block, past - row - count);
            struct fetch own = fetching(head, count * carry->head_stride, 0, 0);
            struct fetch next = fetching(logits + (row + count) * stride, after * stride, head + count * carry->head_stride,
                                         carry->head_gradient ? 0 : after * carry->head_stride);
            gradient_share(logits + row * stride, count, stride, width, student, teacher, divergence, &mixture,
                           constants, gradient, step);
            if (carry->target.label)
                subtract_target(gradient, step, row, count, width, &carry->target);
            if (carry->bias_gradient)
                for (int r = 0; r < count; r++)
                    carry->bias_gradient[row + r] += sum_of(gradient + r * step, width);
            if (carry->head_gradient)
                set->to_head(gradient, step, count, width, carry,
                             carry->head_gradient + row * carry->head_gradient_stride, &own);
            if (hidden)
                set->to_hidden(gradient, step, count, width, carry, head, hidden, !carry->first_tile || row > first,
                               panel, &next);
        }
    }
}
