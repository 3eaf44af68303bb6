/* The loss's matrix products for one set of instructions, a block of vocabulary entries at a time.
 *
 * cpu_kernels.c includes this file once for each set and says what that has: LANES floats in a vector, registers for
 * TILE_ROWS rows of two vectors each, and SET, which makes a set's own names. A tile of the result stays in registers
 * while the sum runs. What it is added to, and what comes after, is asked of memory meanwhile: a product of few tokens
 * does too little with each number of the head to wait for them.
 */

#define VECTOR SET(vector)
#define COLUMNS (2 * LANES)

typedef float VECTOR __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* sums[i] += a[i step] b, for two vectors b. */
INLINE void SET(add_outer)(int rows, VECTOR sums[][2], const float *a, long step, const float *b) {
    const VECTOR left = *(const VECTOR *)b, right = *(const VECTOR *)(b + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sums[i][0] += a[i * step] * left;
        sums[i][1] += a[i * step] * right;
    }
}

/* out[i] = sum over k < count of a[i row_step + k step] b[k], for so many rows of COLUMNS floats, or added to it. */
INLINE void SET(tile)(int rows, long count, const float *a, long row_step, long step, const float *b, float *out,
                      long out_stride, int add, struct fetch *fetch) {
    VECTOR sums[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = (VECTOR){0};
    long fetched = count < rows ? count : rows;
    for (long k = 0; k < fetched; k++) {
        __builtin_prefetch(out + k * out_stride, 1);
        __builtin_prefetch(out + k * out_stride + COLUMNS - 1, 1);
        fetch_some(fetch);
        SET(add_outer)(rows, sums, a + k * step, row_step, b + k * COLUMNS);
    }
    for (long k = fetched; k < count; k++)
        SET(add_outer)(rows, sums, a + k * step, row_step, b + k * COLUMNS);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++, out += out_stride) {
        VECTOR *left = (VECTOR *)out, *right = (VECTOR *)(out + LANES);
        if (add) {
            sums[i][0] += *left;
            sums[i][1] += *right;
        }
        *left = sums[i][0];
        *right = sums[i][1];
    }
}

/* As many of these rows as one tile takes: few numbers, each of which has code of its own in `fitted`. */
static int SET(fitting)(long rows) {
    if (rows >= TILE_ROWS)
        return TILE_ROWS;
    return rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

/* `tile` for so many rows, as `fitting` gives them. */
INLINE void SET(fitted)(int rows, long count, const float *a, long row_step, long step, const float *b, float *out,
                        long out_stride, int add, struct fetch *fetch) {
#define CASE(number)                                                                                                   \
    case number:                                                                                                       \
        SET(tile)(number, count, a, row_step, step, b, out, out_stride, add, fetch);                                   \
        break
    switch (rows) {
        CASE(TILE_ROWS);
#if TILE_ROWS > 8
        CASE(8);
#endif
        CASE(4);
        CASE(2);
        CASE(1);
    }
#undef CASE
}

/* The same for rows of a, (rows, count), into the first `columns` columns of `out`. */
static void SET(by_rows)(int rows, long count, const float *a, long stride, const float *b, float *out, long out_stride,
                         long columns, int add, struct fetch *fetch) {
    if (columns >= COLUMNS) {
        SET(fitted)(rows, count, a, stride, 1, b, out, out_stride, add, fetch);
        return;
    }
    float edge[TILE_ROWS * COLUMNS];
    SET(fitted)(rows, count, a, stride, 1, b, edge, COLUMNS, 0, fetch);
    for (int i = 0; i < rows; i++, out += out_stride)
        for (long k = 0; k < columns; k++)
            out[k] = edge[i * COLUMNS + k] + (add ? out[k] : 0);
}

/* Logits (rows, model->tokens) of so many rows of the head. */
static void SET(to_logits)(const struct model *model, const float *head, long rows, float *logits, long stride,
                           struct fetch *fetch) {
    for (long k = 0; k == 0 || k < model->hidden_size; k += DEPTH) {
        long depth = model->hidden_size - k < DEPTH ? model->hidden_size - k : DEPTH;
        for (long j = 0; j < model->tokens; j += COLUMNS) {
            const float *hidden = model->hidden + j * model->hidden_size + k * COLUMNS;
            for (long row = 0, fit; row < rows; row += fit) {
                fit = SET(fitting)(rows - row);
                SET(by_rows)(fit, depth, head + row * model->head_stride + k, model->head_stride, hidden,
                             logits + row * stride + j, stride, model->tokens - j, k > 0, fetch);
            }
        }
    }
}

/* Adds gradient (rows, width) times hidden states to rows of the head's gradient, or sets them to it. */
static void SET(to_head)(const float *gradient, long stride, long rows, long width, const struct carry *carry,
                         float *out, struct fetch *fetch) {
    for (long row = 0, fit; row < rows; row += fit) {
        fit = SET(fitting)(rows - row);
        for (long j = 0; j < carry->hidden_size; j += COLUMNS)
            SET(by_rows)(fit, width, gradient + row * stride, stride, carry->hidden + j * width,
                         out + row * carry->head_gradient_stride + j, carry->head_gradient_stride,
                         carry->hidden_size - j, carry->add, fetch);
    }
}

/* Adds transposed gradient times the rows' head to panels of (width, COLUMNS), or sets them to it. */
static void SET(to_hidden)(const float *gradient, long stride, long rows, long width, const struct carry *carry,
                           const float *head, float *out, int add, float *panel, struct fetch *fetch) {
    for (long j = 0; j < carry->hidden_size; j += COLUMNS, out += width * COLUMNS) {
        const float *from = head + j;
        for (long row = 0; row < rows; row++, from += carry->head_stride)
            if (j + COLUMNS <= carry->hidden_size)
                memcpy(panel + row * COLUMNS, from, 4 * COLUMNS);
            else
                for (long k = 0; k < COLUMNS; k++)
                    panel[row * COLUMNS + k] = j + k < carry->hidden_size ? from[k] : 0;
        for (long token = 0, fit; token < width; token += fit) {
            fit = SET(fitting)(width - token);
            SET(fitted)(fit, rows, gradient + token, 1, stride, panel, out + token * COLUMNS, COLUMNS, add, fetch);
        }
    }
}

static const struct products SET(products) = {TILE_ROWS, COLUMNS, SET(to_logits), SET(to_head), SET(to_hidden)};

#undef VECTOR
#undef COLUMNS
#undef LANES
#undef TILE_ROWS
#undef SET
