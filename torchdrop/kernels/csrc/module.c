/* Optional doors to td_masked_row and td_fused for CPython, compiled in where its headers are: a call through them takes a fifth
 * of the time of one through ctypes. Only the stable interface of 3.10 is used, so one library serves every later version. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

void td_masked_row(int kind, void *out, const void *in, int64_t length, const void *key, const double *law,
                   int threads);
void td_fused(int operation, int kind, void *out, const void *in, const void *bias, int64_t columns, const void *other,
              int64_t n, const void *key, const double *laws, int threads, int width);

/* From this many elements on, the lock is given back meanwhile. */
#define LONG 32768

static PyObject *masked_row(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 7) {
        PyErr_SetString(PyExc_TypeError, "masked_row takes kind, out, in, length, key, law and threads");
        return NULL;
    }
    const long kind = PyLong_AsLong(args[0]);
    void *out = PyLong_AsVoidPtr(args[1]);
    const void *in = PyLong_AsVoidPtr(args[2]);
    const long long length = PyLong_AsLongLong(args[3]);
    const char *key = PyBytes_AsString(args[4]);
    const double *law = PyLong_AsVoidPtr(args[5]);
    const long threads = PyLong_AsLong(args[6]);
    if (PyErr_Occurred()) return NULL;
    if (kind < 0 || kind > 10 || (kind > 3 && kind < 7) || threads < 1 || threads > 65536 ||
        PyBytes_Size(args[4]) != 16) {
        PyErr_SetString(PyExc_ValueError,
                        "masked_row: kind must be 0 to 3 or 7 to 10, the key 16 bytes, threads 1 to 65536");
        return NULL;
    }
    if (length < LONG) {
        td_masked_row((int)kind, out, in, length, key, law, 1);
    } else {
        PyThreadState *state = PyEval_SaveThread();
        td_masked_row((int)kind, out, in, length, key, law, (int)threads);
        PyEval_RestoreThread(state);
    }
    Py_RETURN_NONE;
}

static PyObject *fused(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 12) {
        PyErr_SetString(PyExc_TypeError, "fused takes operation, kind, out, in, bias, columns, other, length, key, law, "
                                         "threads and width");
        return NULL;
    }
    const long operation = PyLong_AsLong(args[0]), kind = PyLong_AsLong(args[1]);
    void *out = PyLong_AsVoidPtr(args[2]);
    const void *in = PyLong_AsVoidPtr(args[3]);
    const void *bias = args[4] == Py_None ? NULL : PyLong_AsVoidPtr(args[4]);
    const long long columns = PyLong_AsLongLong(args[5]);
    const void *other = PyLong_AsVoidPtr(args[6]);
    const long long length = PyLong_AsLongLong(args[7]);
    const char *key = PyBytes_AsString(args[8]);
    const double *law = PyLong_AsVoidPtr(args[9]);
    const long threads = PyLong_AsLong(args[10]), width = PyLong_AsLong(args[11]);
    if (PyErr_Occurred()) return NULL;
    if (operation < 0 || operation > 1 || kind < 0 || kind > 3 || columns < 1 || threads < 1 || threads > 65536 ||
        PyBytes_Size(args[8]) != 16) {
        PyErr_SetString(PyExc_ValueError, "fused: operation must be 0 or 1, kind 0 to 3, columns at least 1, the key 16 "
                                          "bytes, threads 1 to 65536");
        return NULL;
    }
    if (length < LONG) {
        td_fused((int)operation, (int)kind, out, in, bias, columns, other, length, key, law, 1, (int)width);
    } else {
        PyThreadState *state = PyEval_SaveThread();
        td_fused((int)operation, (int)kind, out, in, bias, columns, other, length, key, law, (int)threads, (int)width);
        PyEval_RestoreThread(state);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"masked_row", (PyCFunction)(void (*)(void))masked_row, METH_FASTCALL, NULL},
    {"fused", (PyCFunction)(void (*)(void))fused, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
