/* The plan of an embedding: a table of which every token takes the row of its number. It has one step, whose weight is the table.
 *
 * Rows are read from the file one by one and not through its mapping: a page of the mapping brings the pages around it along, so that the
 * rows of a short prompt would make most of the table resident. Where a system has no such reads, the mapping serves. */
#ifndef VLM_PLAN_ROWS_H
#define VLM_PLAN_ROWS_H

#include "plan.h"

/* Bytes from row to row. WEIGHT_VECTOR: floats. WEIGHT_HALF_ROWS: float16. WEIGHT_BYTE_ROWS: a scale float32, then codes in 8 bits. */
size_t rows_stride(const PanelMatrix *table);

/* What is wrong with such a plan that was read, or NULL. */
const char *rows_check(const Plan *plan);

/* The rows of `count` tokens, [count][hidden]. −1 with the reason in `message`: no such row, no memory, or a file that cannot be read. */
int rows_run(Plan *plan, const int64_t *tokens, size_t count, float *out, char message[PLAN_MESSAGE_SIZE]);

#endif
