/* td_row and td_fused as functions of a module for CPython.
 *
 * A call through them takes a fifth of the time of one through ctypes. This file is compiled in where Python's headers
 * are. It uses only the stable interface of 3.10, so one library serves every later version. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

#include "entry_points.h"

/* Python's lock is given back during a call from this many elements on. */
#define TD_LONG 32768

/* Headers of 3.12 and 3.13 let Py_RETURN_NONE take no reference, because None is immortal there. It is not in 3.11, which
 * may load what was compiled with them. */
static PyObject *none(void) {
    Py_IncRef(Py_None);
    return Py_None;
}

static PyObject *row(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError,
                        "row takes operation, element type, out, in, length, key, parameters and threads");
        return NULL;
    }
    const long operation = PyLong_AsLong(args[0]), element_type = PyLong_AsLong(args[1]);
    void *out = PyLong_AsVoidPtr(args[2]);
    const void *in = PyLong_AsVoidPtr(args[3]);
    const long long length = PyLong_AsLongLong(args[4]);
    const char *key = PyBytes_AsString(args[5]);
    const double *params = PyLong_AsVoidPtr(args[6]);
    const long threads = PyLong_AsLong(args[7]);
    if (PyErr_Occurred()) return NULL;
    if ((operation != TD_DROPOUT && operation != TD_RELU_DROPOUT) || element_type < 0 ||
        element_type >= TD_ELEMENT_TYPES || threads < 1 || threads > 65536 || PyBytes_Size(args[5]) != 16) {
        PyErr_SetString(PyExc_ValueError, "row: the operation must be dropout or dropout after relu, the element type "
                                          "0 to 3, the key 16 bytes, threads 1 to 65536");
        return NULL;
    }
    if (length < TD_LONG) {
        td_row((int)operation, (int)element_type, out, in, length, key, params, 1);
    } else {
        PyThreadState *state = PyEval_SaveThread();
        td_row((int)operation, (int)element_type, out, in, length, key, params, (int)threads);
        PyEval_RestoreThread(state);
    }
    return none();
}

static PyObject *fused(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 12) {
        PyErr_SetString(PyExc_TypeError, "fused takes operation, element type, out, in, bias, columns, other, length, "
                                         "key, parameters, threads and width");
        return NULL;
    }
    const long operation = PyLong_AsLong(args[0]), element_type = PyLong_AsLong(args[1]);
    void *out = PyLong_AsVoidPtr(args[2]);
    const void *in = PyLong_AsVoidPtr(args[3]);
    const void *bias = args[4] == Py_None ? NULL : PyLong_AsVoidPtr(args[4]);
    const long long columns = PyLong_AsLongLong(args[5]);
    const void *other = PyLong_AsVoidPtr(args[6]);
    const long long length = PyLong_AsLongLong(args[7]);
    const char *key = PyBytes_AsString(args[8]);
    const double *params = PyLong_AsVoidPtr(args[9]);
    const long threads = PyLong_AsLong(args[10]), width = PyLong_AsLong(args[11]);
    if (PyErr_Occurred()) return NULL;
    if ((operation != TD_DROPOUT_ADD && operation != TD_RELU_DROPOUT_BACKWARD) || element_type < 0 ||
        element_type >= TD_ELEMENT_TYPES || columns < 1 || threads < 1 || threads > 65536 ||
        PyBytes_Size(args[8]) != 16) {
        PyErr_SetString(PyExc_ValueError, "fused: the operation must be dropout with an addition or the gradient of "
                                          "dropout after relu, the element type 0 to 3, columns at least 1, the key 16 "
                                          "bytes, threads 1 to 65536");
        return NULL;
    }
    if (length < TD_LONG) {
        td_fused((int)operation, (int)element_type, out, in, bias, columns, other, length, key, params, 1, (int)width);
    } else {
        PyThreadState *state = PyEval_SaveThread();
        td_fused((int)operation, (int)element_type, out, in, bias, columns, other, length, key, params, (int)threads,
                 (int)width);
        PyEval_RestoreThread(state);
    }
    return none();
}

static PyMethodDef methods[] = {
    {"row", (PyCFunction)(void (*)(void))row, METH_FASTCALL, NULL},
    {"fused", (PyCFunction)(void (*)(void))fused, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
