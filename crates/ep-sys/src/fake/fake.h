/* What the two fake libraries share. Compiled once per test, with
 *   JOURNAL   file to which every call is appended, one line each,
 *   FAIL      name of the call that fails (any other value: none does),
 *   STATUS    what that call returns,
 * and with -D<entry point>=absent for entry points that the library shall not export. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static unsigned long long current(void);

static unsigned enter(const char *name, const char *format, ...) {
    FILE *journal = fopen(JOURNAL, "a");
    if (journal) {
        va_list arguments;
        va_start(arguments, format);
        fprintf(journal, "%llx: %s", current(), name);
        vfprintf(journal, format, arguments);
        fputc('\n', journal);
        fclose(journal);
        va_end(arguments);
    }
    return strcmp(name, FAIL) ? 0 : STATUS;
}

/* Journals the call and its arguments, and fails it if it is the one. */
#define ENTER(...)                                    \
    do {                                              \
        unsigned status = enter(__func__, __VA_ARGS__); \
        if (status) return status;                    \
    } while (0)
