class _v_ndarray:
    def __init__(self, data, shape):
        self.data = data
        self.shape = shape
        self.ndim = len(shape)
        self.size = _v_product(shape)
        self.dtype = 'float64'
    def __iter__(self):
        return iter(_v_rows(self))
    def __contains__(self, item):
        return item in _v_flat(self.data)
    def __repr__(self):
        return 'array(' + repr(self.data) + ')'
    def __str__(self):
        return str(self.data).replace(',', '')
    def tolist(self):
        return _v_nested_copy(self.data)
    def item(self):
        return _v_flat(self.data)[0]
    def copy(self):
        return _v_wrap(_v_nested_copy(self.data))
    def astype(self, kind):
        return _v_cast(self, kind)
    def flatten(self):
        return _v_wrap(_v_flat(self.data))
    def ravel(self):
        return _v_wrap(_v_flat(self.data))
    def reshape(self, *shape):
        return _v_numpy_reshape(self, shape[0] if len(shape) == 1 else shape)
    def transpose(self):
        return _v_transpose(self)
    def squeeze(self):
        return _v_numpy_squeeze(self)
    def sum(self, axis=None):
        return _v_numpy_sum(self, axis)
    def prod(self, axis=None):
        return _v_numpy_prod(self, axis)
    def mean(self, axis=None):
        return _v_numpy_mean(self, axis)
    def std(self, axis=None, ddof=0):
        return _v_numpy_std(self, axis, ddof)
    def var(self, axis=None, ddof=0):
        return _v_numpy_var(self, axis, ddof)
    def min(self, axis=None):
        return _v_numpy_min(self, axis)
    def max(self, axis=None):
        return _v_numpy_max(self, axis)
    def argmin(self, axis=None):
        return _v_numpy_argmin(self, axis)
    def argmax(self, axis=None):
        return _v_numpy_argmax(self, axis)
    def argsort(self):
        return _v_numpy_argsort(self)
    def sort(self):
        self.data = _v_numpy_sort(self).data
    def any(self, axis=None):
        return _v_numpy_any(self, axis)
    def all(self, axis=None):
        return _v_numpy_all(self, axis)
    def cumsum(self):
        return _v_numpy_cumsum(self)
    def round(self, decimals=0):
        return _v_numpy_round(self, decimals)
    def clip(self, a_min=None, a_max=None):
        return _v_numpy_clip(self, a_min, a_max)
    def dot(self, other):
        return _v_numpy_dot(self, other)
    def nonzero(self):
        return _v_numpy_nonzero(self)
def _v_product(shape):
    out = 1
    for side in shape:
        out *= side
    return out
def _v_is_array(value):
    return isinstance(value, _v_ndarray)
def _v_nested_copy(data):
    return [_v_nested_copy(item) for item in data] if isinstance(data, list) else data
def _v_flat(data):
    if not isinstance(data, list):
        return [data]
    if len(data) == 0 or not isinstance(data[0], list):
        return list(data)
    out = []
    for item in data:
        out.extend(_v_flat(item))
    return out
def _v_plain(value):
    if _v_is_array(value):
        return value.data
    if isinstance(value, (list, tuple)):
        return [_v_plain(item) for item in value]
    if isinstance(value, (int, float, str, dict)) or value is None:
        return value
    return [_v_plain(item) for item in value]
def _v_wrap(data):
    shape = []
    level = data
    while isinstance(level, list):
        shape.append(len(level))
        if len(level) == 0:
            break
        level = level[0]
    _v_check_shape(data, shape, 0)
    return _v_ndarray(data, tuple(shape))
def _v_check_shape(data, shape, depth):
    if depth == len(shape):
        if isinstance(data, list):
            raise ValueError('setting an array element with a sequence: the array has an inhomogeneous shape')
        return
    if not isinstance(data, list) or len(data) != shape[depth]:
        raise ValueError('setting an array element with a sequence: the array has an inhomogeneous shape')
    if depth + 1 < len(shape):
        for item in data:
            _v_check_shape(item, shape, depth + 1)
def _v_give(data):
    return _v_wrap(data) if isinstance(data, list) else data
def _v_array_of(value):
    return value if _v_is_array(value) else _v_wrap(_v_plain(value))
def _v_rows(array):
    return [_v_give(item) for item in array.data]
def _v_each(function, data):
    return [_v_each(function, item) for item in data] if isinstance(data, list) else function(data)
def _v_pair(function, a, b):
    if isinstance(a, list) and isinstance(b, list):
        depth_a = _v_depth(a)
        depth_b = _v_depth(b)
        if depth_a > depth_b:
            return [_v_pair(function, item, b) for item in a]
        if depth_b > depth_a:
            return [_v_pair(function, a, item) for item in b]
        if len(a) == len(b):
            return [_v_pair(function, x, y) for x, y in zip(a, b)]
        if len(a) == 1:
            return [_v_pair(function, a[0], item) for item in b]
        if len(b) == 1:
            return [_v_pair(function, item, b[0]) for item in a]
        raise ValueError('operands could not be broadcast together with shapes (' + str(len(a)) + ',) (' + str(len(b)) + ',)')
    if isinstance(a, list):
        return [_v_pair(function, item, b) for item in a]
    if isinstance(b, list):
        return [_v_pair(function, a, item) for item in b]
    return function(a, b)
def _v_depth(data):
    depth = 0
    while isinstance(data, list):
        depth += 1
        data = data[0] if len(data) > 0 else None
    return depth
def _v_both(function, a, b):
    return _v_give(_v_pair(function, _v_plain(a), _v_plain(b)))
def _v_iadd(a, b):
    if isinstance(a, list):
        a.extend(_v_rows(b) if _v_is_array(b) else b)
        return a
    out = _v_add(a, b)
    if _v_is_array(a) and a.shape == out.shape:
        a.data = out.data
        return a
    return out
def _v_add(a, b):
    if _v_is_array(a) or _v_is_array(b):
        return _v_both(lambda x, y: _v_num(x) + _v_num(y), a, b)
    return _v_num(a) + _v_num(b)
def _v_sub(a, b):
    if _v_is_array(a) or _v_is_array(b):
        return _v_both(lambda x, y: _v_num(x) - _v_num(y), a, b)
    return _v_num(a) - _v_num(b)
def _v_mul(a, b):
    if _v_is_array(a) or _v_is_array(b):
        return _v_both(lambda x, y: _v_num(x) * _v_num(y), a, b)
    return a * b
def _v_quotient(x, y):
    if y == 0:
        if x == 0 or x != x:
            return float('nan')
        return float('inf') if x > 0 else float('-inf')
    return x / y
def _v_div(a, b):
    if _v_is_array(a) or _v_is_array(b):
        return _v_both(_v_quotient, a, b)
    return a / b
def _v_floordiv(a, b):
    return _v_both(lambda x, y: x // y, a, b) if _v_is_array(a) or _v_is_array(b) else a // b
def _v_remainder(a, b):
    return _v_both(lambda x, y: x % y, a, b) if _v_is_array(a) or _v_is_array(b) else _v_mod(a, b)
def _v_pow(a, b):
    return _v_both(lambda x, y: x ** y, a, b) if _v_is_array(a) or _v_is_array(b) else a ** b
def _v_and(a, b):
    return _v_both(lambda x, y: x & y, a, b) if _v_is_array(a) or _v_is_array(b) else a & b
def _v_or(a, b):
    return _v_both(lambda x, y: x | y, a, b) if _v_is_array(a) or _v_is_array(b) else a | b
def _v_xor(a, b):
    return _v_both(lambda x, y: x ^ y, a, b) if _v_is_array(a) or _v_is_array(b) else a ^ b
def _v_matmul(a, b):
    return _v_numpy_dot(a, b)
def _v_lt(a, b):
    return _v_both(lambda x, y: x < y, a, b) if _v_is_array(a) or _v_is_array(b) else a < b
def _v_le(a, b):
    return _v_both(lambda x, y: x <= y, a, b) if _v_is_array(a) or _v_is_array(b) else a <= b
def _v_gt(a, b):
    return _v_both(lambda x, y: x > y, a, b) if _v_is_array(a) or _v_is_array(b) else a > b
def _v_ge(a, b):
    return _v_both(lambda x, y: x >= y, a, b) if _v_is_array(a) or _v_is_array(b) else a >= b
def _v_eq(a, b):
    return _v_both(lambda x, y: x == y, a, b) if _v_is_array(a) or _v_is_array(b) else a == b
def _v_ne(a, b):
    return _v_both(lambda x, y: x != y, a, b) if _v_is_array(a) or _v_is_array(b) else a != b
def _v_neg(a):
    return _v_give(_v_each(lambda x: -x, a.data)) if _v_is_array(a) else -a
def _v_invert(a):
    if _v_is_array(a):
        return _v_give(_v_each(lambda x: (not x) if x is True or x is False else ~x, a.data))
    return ~a
def _v_len(value):
    return len(value.data) if _v_is_array(value) else len(value)
def _v_abs(value):
    return _v_numpy_abs(value) if _v_is_array(value) else abs(value)
def _v_round(number, ndigits=None):
    if _v_is_array(number):
        return _v_numpy_round(number, ndigits or 0)
    return _v_nearest(number, ndigits)
def _v_float(*value):
    return float(*[_v_flat(one.data)[0] if _v_is_array(one) else one for one in value])
def _v_int(*value):
    return int(*[_v_flat(one.data)[0] if _v_is_array(one) else one for one in value])
def _v_get(value, key):
    if not _v_is_array(value):
        return value[key]
    return _v_give(_v_pick(value.data, list(key) if isinstance(key, tuple) else [key]))
def _v_pick(data, keys):
    if len(keys) == 0:
        return data
    key = keys[0]
    rest = keys[1:]
    if key is None:
        return [_v_pick(data, rest)]
    if key is Ellipsis:
        while len(rest) < _v_depth(data):
            rest = [slice(None, None, None)] + rest
        return _v_pick(data, rest)
    if isinstance(key, slice):
        return [_v_pick(item, rest) for item in data[key]]
    if _v_is_array(key) or isinstance(key, list):
        chosen = _v_plain(key)
        if len(chosen) > 0 and isinstance(chosen[0], list):
            if not _v_is_mask(chosen) or _v_depth(chosen) != _v_depth(data):
                raise NotImplementedError('this index of an array is not supported')
            return [item for item, wanted in zip(_v_flat(data), _v_flat(chosen)) if wanted]
        if len(chosen) > 0 and (chosen[0] is True or chosen[0] is False):
            if len(chosen) != len(data):
                raise IndexError('boolean index did not match indexed array')
            return [_v_pick(item, rest) for item, wanted in zip(data, chosen) if wanted]
        return [_v_pick(data[at], rest) for at in chosen]
    return _v_pick(data[key], rest)
def _v_is_mask(data):
    return all([item is True or item is False for item in _v_flat(data)])
def _v_change(value, key, change):
    _v_set(value, key, change(_v_get(value, key)))
def _v_set(value, key, item):
    if not _v_is_array(value):
        if isinstance(key, slice):
            _v_splice(value, key, item)
        else:
            value[key] = item
        return
    keys = list(key) if isinstance(key, tuple) else [key]
    _v_put(value.data, keys, _v_plain(item))
def _v_places(data, key):
    if isinstance(key, slice):
        return list(range(len(data)))[key]
    if _v_is_array(key) or isinstance(key, list):
        chosen = _v_plain(key)
        if len(chosen) > 0 and (chosen[0] is True or chosen[0] is False):
            return [at for at in range(len(data)) if chosen[at]]
        return chosen
    return None
def _v_put(data, keys, item):
    if (_v_is_array(keys[0]) or isinstance(keys[0], list)) and _v_depth(_v_plain(keys[0])) > 1:
        mask = _v_plain(keys[0])
        if isinstance(item, list) or not _v_is_mask(mask) or _v_depth(mask) != _v_depth(data):
            raise NotImplementedError('this index of an array is not supported')
        for row, wanted in zip(data, mask):
            _v_put(row, [wanted], item)
        return
    places = _v_places(data, keys[0])
    if places is None:
        if len(keys) > 1:
            _v_put(data[keys[0]], keys[1:], item)
        elif isinstance(data[keys[0]], list):
            row = data[keys[0]]
            for at in range(len(row)):
                row[at] = item[at] if isinstance(item, list) else item
        else:
            data[keys[0]] = item
        return
    for turn, at in enumerate(places):
        one = item[turn] if isinstance(item, list) and len(item) == len(places) else item
        _v_put(data, [at] + keys[1:], one)
def _v_transpose(value):
    if value.ndim < 2:
        return value
    return _v_give([list(row) for row in zip(*value.data)])
def _v_cast(value, kind):
    name = kind if isinstance(kind, str) else _v_kind(kind)
    if name.startswith('float'):
        return _v_give(_v_each(lambda x: float(x), value.data))
    if name.startswith('int') or name.startswith('uint'):
        return _v_give(_v_each(lambda x: int(x), value.data))
    if name.startswith('bool'):
        return _v_give(_v_each(lambda x: bool(x), value.data))
    return _v_give(_v_each(lambda x: str(x), value.data))
def _v_kind(kind):
    if kind is float or kind is int or kind is bool or kind is str:
        return kind.__name__
    return type(kind(1)).__name__
def _v_along(function, value, axis):
    data = _v_plain(value)
    if axis is None:
        return function(_v_flat(data))
    depth = _v_depth(data)
    axis = axis + depth if axis < 0 else axis
    if depth <= 1:
        return function(data)
    if axis == 0:
        return _v_give([_v_along_rows(function, [row[at] for row in data]) for at in range(len(data[0]))])
    return _v_give([_v_plain(_v_along(function, row, axis - 1)) for row in data])
def _v_along_rows(function, column):
    return _v_plain(_v_along(function, column, 0))
def _v_total(items):
    return sum([_v_num(item) for item in items])
def _v_average(items):
    return _v_total(items) / len(items) if len(items) > 0 else float('nan')
def _v_variance(items, ddof):
    middle = _v_average(items)
    return sum([(item - middle) ** 2 for item in items]) / (len(items) - ddof) if len(items) > ddof else float('nan')
def _v_middle(items):
    items = sorted(items)
    half = len(items) // 2
    if len(items) == 0:
        return float('nan')
    return items[half] if len(items) % 2 == 1 else (items[half - 1] + items[half]) / 2
def _v_where_best(items, largest):
    if len(items) == 0:
        raise ValueError('attempt to get argmin or argmax of an empty sequence')
    best = 0
    for at in range(1, len(items)):
        if (items[at] > items[best]) if largest else (items[at] < items[best]):
            best = at
    return best
_v_numpy_ndarray = _v_ndarray
def _v_numpy_array(value, dtype=None, copy=True):
    array = _v_wrap(_v_nested_copy(value.data)) if copy and _v_is_array(value) else _v_array_of(value)
    return array if dtype is None else _v_cast(array, dtype)
def _v_numpy_asarray(value, dtype=None):
    return _v_numpy_array(value, dtype, False)
def _v_numpy_zeros(shape, dtype=None):
    return _v_numpy_full(shape, 0.0, dtype)
def _v_numpy_ones(shape, dtype=None):
    return _v_numpy_full(shape, 1.0, dtype)
def _v_numpy_full(shape, value, dtype=None):
    sides = [shape] if isinstance(shape, int) else list(shape)
    array = _v_give(_v_filled(sides, value))
    return array if dtype is None else _v_cast(array, dtype)
def _v_filled(sides, value):
    return value if len(sides) == 0 else [_v_filled(sides[1:], value) for at in range(sides[0])]
def _v_numpy_arange(start, stop=None, step=1):
    first = 0 if stop is None else start
    last = start if stop is None else stop
    out = []
    at = 0
    while (first + at * step < last) if step > 0 else (first + at * step > last):
        out.append(first + at * step)
        at += 1
    return _v_wrap(out)
def _v_numpy_linspace(start, stop, num=50):
    if num == 1:
        return _v_wrap([float(start)])
    return _v_wrap([start + (stop - start) * at / (num - 1) for at in range(num)])
def _v_numpy_reshape(value, shape):
    flat = _v_flat(_v_plain(value))
    sides = [shape] if isinstance(shape, int) else list(shape)
    if -1 in sides:
        known = _v_product([side for side in sides if side != -1])
        sides[sides.index(-1)] = len(flat) // known
    if _v_product(sides) != len(flat):
        raise ValueError('cannot reshape array of size ' + str(len(flat)) + ' into shape ' + str(tuple(sides)))
    for side in reversed(sides[1:]):
        flat = [flat[at:at + side] for at in range(0, len(flat), side)]
    return _v_wrap(flat)
def _v_numpy_squeeze(value):
    data = _v_plain(value)
    while isinstance(data, list) and len(data) == 1:
        data = data[0]
    return _v_give(data)
def _v_numpy_ravel(value):
    return _v_wrap(_v_flat(_v_plain(value)))
def _v_numpy_transpose(value):
    return _v_transpose(_v_array_of(value))
def _v_numpy_sum(value, axis=None):
    return _v_along(_v_total, value, axis)
def _v_numpy_prod(value, axis=None):
    return _v_along(_v_product, value, axis)
def _v_numpy_mean(value, axis=None):
    return _v_along(_v_average, value, axis)
def _v_numpy_average(value, axis=None, weights=None):
    if weights is None:
        return _v_along(_v_average, value, axis)
    pairs = list(zip(_v_flat(_v_plain(value)), _v_flat(_v_plain(weights))))
    return sum([item * weight for item, weight in pairs]) / sum([weight for item, weight in pairs])
def _v_numpy_median(value, axis=None):
    return _v_along(_v_middle, value, axis)
def _v_numpy_var(value, axis=None, ddof=0):
    return _v_along(lambda items: _v_variance(items, ddof), value, axis)
def _v_numpy_std(value, axis=None, ddof=0):
    return _v_along(lambda items: _v_variance(items, ddof) ** 0.5, value, axis)
def _v_numpy_min(value, axis=None):
    return _v_along(min, value, axis)
def _v_numpy_max(value, axis=None):
    return _v_along(max, value, axis)
def _v_numpy_amin(value, axis=None):
    return _v_along(min, value, axis)
def _v_numpy_amax(value, axis=None):
    return _v_along(max, value, axis)
def _v_numpy_ptp(value, axis=None):
    return _v_along(lambda items: max(items) - min(items), value, axis)
def _v_numpy_percentile(value, q, axis=None):
    return _v_along(lambda items: _v_quantile(items, q / 100), value, axis)
def _v_numpy_quantile(value, q, axis=None):
    return _v_along(lambda items: _v_quantile(items, q), value, axis)
def _v_quantile(items, q):
    items = sorted(items)
    at = q * (len(items) - 1)
    low = int(at)
    high = min(low + 1, len(items) - 1)
    return items[low] + (items[high] - items[low]) * (at - low)
def _v_numpy_argmin(value, axis=None):
    return _v_along(lambda items: _v_where_best(items, False), value, axis)
def _v_numpy_argmax(value, axis=None):
    return _v_along(lambda items: _v_where_best(items, True), value, axis)
def _v_numpy_argsort(value):
    items = _v_plain(value)
    return _v_wrap(sorted(range(len(items)), key=lambda at: items[at]))
def _v_numpy_sort(value):
    return _v_wrap(_v_sorted_rows(_v_plain(value)))
def _v_sorted_rows(data):
    return [_v_sorted_rows(row) for row in data] if _v_depth(data) > 1 else sorted(data)
def _v_numpy_unique(value, return_counts=False):
    items = _v_flat(_v_plain(value))
    found = sorted(set(items))
    if return_counts:
        return (_v_wrap(found), _v_wrap([items.count(item) for item in found]))
    return _v_wrap(found)
def _v_numpy_any(value, axis=None):
    return _v_along(lambda items: any([bool(item) for item in items]), value, axis)
def _v_numpy_all(value, axis=None):
    return _v_along(lambda items: all([bool(item) for item in items]), value, axis)
def _v_numpy_count_nonzero(value):
    return len([item for item in _v_flat(_v_plain(value)) if item])
def _v_numpy_nonzero(value):
    data = _v_plain(value)
    if _v_depth(data) > 2:
        raise NotImplementedError('nonzero() of more than two dimensions is not supported')
    if _v_depth(data) == 2:
        places = [(at, column) for at, row in enumerate(data) for column, item in enumerate(row) if item]
        return (_v_wrap([at for at, column in places]), _v_wrap([column for at, column in places]))
    return (_v_wrap([at for at, item in enumerate(data) if item]),)
def _v_numpy_cumsum(value):
    out = []
    total = 0
    for item in _v_flat(_v_plain(value)):
        total += _v_num(item)
        out.append(total)
    return _v_wrap(out)
def _v_numpy_diff(value):
    items = _v_plain(value)
    return _v_wrap([items[at + 1] - items[at] for at in range(len(items) - 1)])
def _v_numpy_dot(a, b):
    a = _v_plain(a)
    b = _v_plain(b)
    if not isinstance(a, list) or not isinstance(b, list):
        return _v_both(lambda x, y: x * y, a, b)
    if _v_depth(a) == 1 and _v_depth(b) == 1:
        if len(a) != len(b):
            raise ValueError('shapes (' + str(len(a)) + ',) and (' + str(len(b)) + ',) not aligned')
        return sum([x * y for x, y in zip(a, b)])
    if _v_depth(a) == 1:
        return _v_wrap([_v_numpy_dot(a, list(column)) for column in zip(*b)])
    if _v_depth(b) == 1:
        return _v_wrap([_v_numpy_dot(row, b) for row in a])
    return _v_wrap([[_v_numpy_dot(row, list(column)) for column in zip(*b)] for row in a])
def _v_numpy_cross(a, b):
    a = _v_plain(a)
    b = _v_plain(b)
    if len(a) == 2:
        return a[0] * b[1] - a[1] * b[0]
    return _v_wrap([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])
def _v_numpy_linalg_norm(value, ord=None, axis=None):
    if ord is not None and (ord != 2 or (axis is None and _v_depth(_v_plain(value)) > 1)):
        raise NotImplementedError('numpy.linalg.norm() of this ord is not supported')
    return _v_along(lambda items: sum([item * item for item in items]) ** 0.5, value, axis)
def _v_numpy_where(test, a=None, b=None):
    if a is None:
        return _v_numpy_nonzero(test)
    first = _v_pair(lambda wanted, x: (wanted, x), _v_plain(test), _v_plain(a))
    return _v_give(_v_pair(lambda pair, y: pair[1] if pair[0] else y, first, _v_plain(b)))
def _v_numpy_concatenate(parts, axis=0):
    parts = [_v_plain(part) for part in parts]
    if axis == 0:
        out = []
        for part in parts:
            out.extend(part)
        return _v_wrap(out)
    return _v_wrap([sum(rows, []) for rows in zip(*parts)])
def _v_numpy_vstack(parts):
    return _v_wrap([row for part in parts for row in (_v_plain(part) if _v_depth(_v_plain(part)) > 1 else [_v_plain(part)])])
def _v_numpy_stack(parts):
    return _v_wrap([_v_plain(part) for part in parts])
def _v_numpy_append(value, more):
    return _v_wrap(_v_flat(_v_plain(value)) + _v_flat(_v_plain(more)))
def _v_numpy_abs(value):
    return _v_map_numbers(abs, value)
def _v_numpy_absolute(value):
    return _v_map_numbers(abs, value)
def _v_map_numbers(function, value):
    return _v_give(_v_each(function, _v_plain(value)))
def _v_numpy_sqrt(value):
    return _v_map_numbers(lambda x: x ** 0.5 if x >= 0 else float('nan'), value)
def _v_numpy_square(value):
    return _v_map_numbers(lambda x: x * x, value)
def _v_numpy_sign(value):
    return _v_map_numbers(lambda x: 1 if x > 0 else (-1 if x < 0 else 0), value)
def _v_numpy_round(value, decimals=0):
    return _v_map_numbers(lambda x: round(x, decimals), value)
def _v_numpy_around(value, decimals=0):
    return _v_numpy_round(value, decimals)
def _v_numpy_floor(value):
    return _v_map_numbers(lambda x: float(x // 1), value)
def _v_numpy_ceil(value):
    return _v_map_numbers(lambda x: float(-(-x // 1)), value)
def _v_numpy_isnan(value):
    return _v_map_numbers(lambda x: x != x, value)
def _v_numpy_isfinite(value):
    return _v_map_numbers(lambda x: x - x == 0, value)
def _v_numpy_isinf(value):
    return _v_map_numbers(lambda x: x == x and x - x != 0, value)
def _v_numpy_isclose(a, b, rtol=1e-05, atol=1e-08):
    return _v_both(lambda x, y: abs(x - y) <= atol + rtol * abs(y), a, b)
def _v_numpy_allclose(a, b, rtol=1e-05, atol=1e-08):
    return all(_v_flat(_v_plain(_v_numpy_isclose(a, b, rtol, atol))))
def _v_numpy_clip(value, a_min=None, a_max=None):
    return _v_map_numbers(lambda x: _v_within(x, a_min, a_max), value)
def _v_within(x, low, high):
    x = low if low is not None and x < low else x
    return high if high is not None and x > high else x
def _v_numpy_maximum(a, b):
    return _v_both(lambda x, y: max(x, y), a, b)
def _v_numpy_minimum(a, b):
    return _v_both(lambda x, y: min(x, y), a, b)
def _v_numpy_add(a, b):
    return _v_add(_v_array_of(a) if isinstance(a, list) else a, b)
def _v_numpy_subtract(a, b):
    return _v_sub(_v_array_of(a) if isinstance(a, list) else a, b)
def _v_numpy_multiply(a, b):
    return _v_mul(_v_array_of(a) if isinstance(a, list) else a, b)
def _v_numpy_divide(a, b):
    return _v_div(_v_array_of(a) if isinstance(a, list) else a, b)
def _v_numpy_power(a, b):
    return _v_pow(_v_array_of(a) if isinstance(a, list) else a, b)
def _v_numpy_logical_and(a, b):
    return _v_both(lambda x, y: bool(x) and bool(y), a, b)
def _v_numpy_logical_or(a, b):
    return _v_both(lambda x, y: bool(x) or bool(y), a, b)
def _v_numpy_logical_not(value):
    return _v_map_numbers(lambda x: not x, value)
def _v_numpy_hypot(a, b):
    return _v_both(lambda x, y: (x * x + y * y) ** 0.5, a, b)
def _v_numpy_exp(value):
    import math
    return _v_map_numbers(lambda x: math.exp(x), value)
def _v_numpy_log(value):
    import math
    return _v_map_numbers(lambda x: math.log(x) if x > 0 else (float('-inf') if x == 0 else float('nan')), value)
def _v_numpy_arctan2(a, b):
    import math
    return _v_both(lambda x, y: math.atan2(x, y), a, b)
def _v_numpy_radians(value):
    return _v_map_numbers(lambda x: x * 3.141592653589793 / 180, value)
def _v_numpy_degrees(value):
    return _v_map_numbers(lambda x: x * 180 / 3.141592653589793, value)
_v_numpy_pi = 3.141592653589793
_v_numpy_inf = float('inf')
_v_numpy_nan = float('nan')
_v_numpy_e = 2.718281828459045
_v_numpy_newaxis = None
def _v_numpy_float64(value=0.0):
    return float(value)
def _v_numpy_float32(value=0.0):
    return float(value)
def _v_numpy_int64(value=0):
    return int(value)
def _v_numpy_int32(value=0):
    return int(value)
def _v_numpy_bool_(value=False):
    return bool(value)
