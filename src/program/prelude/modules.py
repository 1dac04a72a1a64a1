def _v_itertools_combinations(items, size):
    items = list(items)
    out = []
    at = list(range(size))
    if size > len(items):
        return iter(out)
    while True:
        out.append(tuple([items[i] for i in at]))
        turn = size - 1
        while turn >= 0 and at[turn] == turn + len(items) - size:
            turn -= 1
        if turn < 0:
            return iter(out)
        at[turn] += 1
        for later in range(turn + 1, size):
            at[later] = at[later - 1] + 1
def _v_itertools_permutations(items, size=None):
    items = list(items)
    size = len(items) if size is None else size
    rows = [()]
    for turn in range(size):
        rows = [row + (at,) for row in rows for at in range(len(items)) if at not in row]
    return iter([tuple([items[at] for at in row]) for row in rows])
def _v_itertools_product(*lists, repeat=1):
    rows = [()]
    for items in [list(one) for one in lists] * repeat:
        rows = [row + (item,) for row in rows for item in items]
    return iter(rows)
def _v_itertools_groupby(items, key=None):
    out = []
    for item in items:
        label = item if key is None else key(item)
        if len(out) > 0 and out[-1][0] == label:
            out[-1][1].append(item)
        else:
            out.append((label, [item]))
    return iter([(label, iter(group)) for label, group in out])
def _v_functools_lru_cache(function=None, maxsize=None):
    if function is None or isinstance(function, int):
        return lambda inner: inner
    return function
def _v_functools_cache(function):
    return function
def _v_math_hypot(*sides):
    return sum([side * side for side in sides]) ** 0.5
def _v_math_dist(a, b):
    return sum([(x - y) * (x - y) for x, y in zip(a, b)]) ** 0.5
def _v_collections_OrderedDict(*args, **options):
    return dict(*args, **options)
def _v_copy_copy(value):
    known = isinstance(value, (list, dict, set)) or type(value).__name__ == 'deque'
    if known or hasattr(value, 'copy'):
        return value.copy()
    if value is None or isinstance(value, (int, float, str, bytes, tuple, frozenset)) or _v_callable(value):
        return value
    raise NotImplementedError('copy.copy() of ' + type(value).__name__ + ' is not supported')
def _v_copy_deepcopy(value):
    if isinstance(value, list):
        return [_v_copy_deepcopy(item) for item in value]
    if type(value).__name__ == 'tuple':
        return tuple([_v_copy_deepcopy(item) for item in value])
    out = _v_copy_copy(value)
    if isinstance(value, dict):
        for key in list(out):
            out[key] = _v_copy_deepcopy(out[key])
    return out
def _v_operator_itemgetter(*keys):
    if len(keys) == 1:
        return lambda value: value[keys[0]]
    return lambda value: tuple([value[key] for key in keys])
def _v_operator_attrgetter(*names):
    if len(names) == 1:
        return lambda value: _v_getattr(value, names[0])
    return lambda value: tuple([_v_getattr(value, name) for name in names])
def _v_operator_add(a, b):
    return a + b
def _v_operator_mul(a, b):
    return a * b
def _v_statistics_numbers(values):
    values = list(values)
    if len(values) == 0:
        raise ValueError('no data points')
    return values
def _v_statistics_mean(values):
    values = _v_statistics_numbers(values)
    total = _v_sum(values)
    whole = all([isinstance(value, int) for value in values]) and total % len(values) == 0
    return total // len(values) if whole else total / len(values)
def _v_statistics_fmean(values):
    return float(_v_statistics_mean(values))
def _v_statistics_median(values):
    values = sorted(_v_statistics_numbers(values))
    middle = len(values) // 2
    return values[middle] if len(values) % 2 == 1 else (values[middle - 1] + values[middle]) / 2
def _v_statistics_median_low(values):
    values = sorted(_v_statistics_numbers(values))
    return values[(len(values) - 1) // 2]
def _v_statistics_median_high(values):
    values = sorted(_v_statistics_numbers(values))
    return values[len(values) // 2]
def _v_statistics_multimode(values):
    counts = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    most = max(counts.values()) if len(counts) > 0 else 0
    return [value for value in counts if counts[value] == most]
def _v_statistics_mode(values):
    return _v_statistics_multimode(_v_statistics_numbers(values))[0]
def _v_statistics_pvariance(values):
    values = _v_statistics_numbers(values)
    middle = sum(values) / len(values)
    return sum([(value - middle) ** 2 for value in values]) / len(values)
def _v_statistics_variance(values):
    values = _v_statistics_numbers(values)
    if len(values) < 2:
        raise ValueError('variance requires at least two data points')
    return _v_statistics_pvariance(values) * len(values) / (len(values) - 1)
def _v_statistics_pstdev(values):
    return _v_statistics_pvariance(values) ** 0.5
def _v_statistics_stdev(values):
    return _v_statistics_variance(values) ** 0.5
def _v_math_prod(items, start=1):
    for item in items:
        start = start * item
    return start
def _v_itertools_chain_from_iterable(lists):
    return iter([item for items in lists for item in items])
def _v_re_sub(pattern, repl, text, count=0, flags=0):
    import re
    if isinstance(repl, str):
        return re.sub(pattern, repl, text, count, flags)
    out = []
    at = 0
    done = 0
    for found in re.finditer(pattern, text, flags):
        if count > 0 and done >= count:
            break
        start, stop = found.span()
        out.append(text[at:start])
        out.append(repl(found))
        at = stop
        done += 1
    out.append(text[at:])
    return ''.join(out)
def _v_math_fsum(items):
    total = 0.0
    rest = 0.0
    for item in items:
        moved = total + item
        rest += (total - moved) + item if abs(total) >= abs(item) else (item - moved) + total
        total = moved
    return total + rest
