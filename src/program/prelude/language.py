def _v_keys(key, items):
    return [key(item) for item in items]
def _v_min(*args, **options):
    return _v_extreme('min', args, options, False)
def _v_max(*args, **options):
    return _v_extreme('max', args, options, True)
def _v_extreme(name, args, options, largest):
    items = list(args[0]) if len(args) == 1 else list(args)
    if len(items) == 0:
        if 'default' in options:
            return options['default']
        raise ValueError(name + '() iterable argument is empty')
    key = options['key']
    keys = items if key is None else _v_keys(key, items)
    best = 0
    for at in range(1, len(items)):
        if (keys[at] > keys[best]) if largest else (keys[at] < keys[best]):
            best = at
    return items[best]
def _v_sorted(items, key=None, reverse=False):
    items = list(items)
    if key is None:
        return sorted(items, reverse=reverse)
    keys = _v_keys(key, items)
    order = sorted(range(len(items)), key=lambda at: keys[at], reverse=reverse)
    return [items[at] for at in order]
def _v_sort(items, key=None, reverse=False):
    ordered = _v_sorted(items, key, reverse)
    items.clear()
    items.extend(ordered)
def _v_map(function, *lists):
    return iter([function(*row) for row in zip(*lists)])
def _v_filter(function, items):
    if function is None:
        return iter([item for item in items if item])
    return iter([item for item in items if function(item)])
def _v_gen(items):
    return iter(items)
def _v_any(body, items, *stages):
    return _v_find(True, body, items, stages, ()) is not None
def _v_all(body, items, *stages):
    return _v_find(False, body, items, stages, ()) is None
def _v_next(body, items, *stages, **options):
    found = _v_find(None, body, items, stages, ())
    if found is not None:
        return found[0]
    if 'default' in options:
        return options['default']
    return next(iter(()))
def _v_unpack(value, count):
    items = list(value)
    if len(items) > count:
        raise ValueError('too many values to unpack (expected ' + str(count) + ')')
    if len(items) < count:
        raise ValueError('not enough values to unpack (expected ' + str(count) + ', got ' + str(len(items)) + ')')
    return items
def _v_find(want, body, items, stages, before):
    for item in items:
        now = before + (item,)
        at = 0
        while at < len(stages) and not stages[at][0] and stages[at][1](*now):
            at += 1
        if at == len(stages):
            value = body(*now)
            if want is None or want is (True if value else False):
                return (value,)
        elif stages[at][0]:
            found = _v_find(want, body, stages[at][1](*now), stages[at + 1:], now)
            if found is not None:
                return found
    return None
def _v_nearest(number, ndigits=None):
    if ndigits is None:
        return round(number)
    if isinstance(number, float) and 0 <= ndigits < 300:
        return float(('{:.' + str(ndigits) + 'f}').format(number))
    return round(number, ndigits)
def _v_num(value):
    return int(value) if value is True or value is False else value
def _v_sum(items, start=0):
    return sum([int(item) if item is True or item is False else item for item in items], start)
def _v_callable(value):
    return type(value).__name__ in ('function', 'builtin_function_or_method', 'type', 'method')
def _v_format(value, spec=''):
    return ('{:' + spec + '}').format(value)
def _v_ascii(value):
    return repr(value)
def _v_bases_of(cls):
    return cls._v_bases if hasattr(cls, '_v_bases') else ()
def _v_isinstance(value, cls):
    if isinstance(value, cls):
        return True
    bases = _v_bases_of(type(value))
    if isinstance(cls, tuple):
        return any([one in bases for one in cls])
    return cls in bases
def _v_issubclass(cls, base):
    bases = base if isinstance(base, tuple) else (base,)
    return any([one is cls or one in _v_bases_of(cls) for one in bases])
def _v_getattr(value, name, *default):
    if hasattr(value, '_v_prop_' + name):
        return getattr(value, '_v_prop_' + name)()
    return getattr(value, name, *default)
def _v_hasattr(value, name):
    return hasattr(value, '_v_prop_' + name) or hasattr(value, name)
def _v_nothing(*args, **options):
    return None
def _v_del(container, key):
    container.pop(key)
def _v_splice(value, key, items):
    items = list(items)
    if key.step is not None:
        for at, item in zip(list(range(len(value)))[key], items):
            value[at] = item
        return
    head = [] if key.start is None else value[:key.start]
    tail = [] if key.stop is None else value[key.stop:]
    if len(head) + len(tail) > len(value):
        tail = value[len(head):]
    value.clear()
    value.extend(head + items + tail)
def _v_missing(name):
    raise NotImplementedError(name + ' is not supported')
def _v_mod(a, b):
    return _v_percent(a, b) if isinstance(a, str) else _v_num(a) % _v_num(b)
def _v_percent(text, values):
    row = values if isinstance(values, tuple) else (values,)
    used = 0
    out = []
    at = 0
    while at < len(text):
        if text[at] != '%':
            stop = text.find('%', at)
            stop = len(text) if stop < 0 else stop
            out.append(text[at:stop])
            at = stop
            continue
        at += 1
        name = None
        if text[at:at + 1] == '(':
            stop = text.find(')', at)
            name = text[at + 1:stop]
            at = stop + 1
        flags = ''
        while at < len(text) and text[at] in '-+ #0':
            flags += text[at]
            at += 1
        width = ''
        while at < len(text) and text[at] in '0123456789*':
            if text[at] == '*':
                width = str(row[used])
                used += 1
            else:
                width += text[at]
            at += 1
        precision = ''
        if text[at:at + 1] == '.':
            at += 1
            precision = '.'
            while at < len(text) and text[at] in '0123456789*':
                if text[at] == '*':
                    precision += str(row[used])
                    used += 1
                else:
                    precision += text[at]
                at += 1
            precision = '.0' if precision == '.' else precision
        if at >= len(text):
            raise ValueError('incomplete format')
        kind = text[at]
        at += 1
        if kind == '%':
            out.append('%')
            continue
        if name is not None:
            value = values[name]
        else:
            if used >= len(row):
                raise TypeError('not enough arguments for format string')
            value = row[used]
            used += 1
        sign = '+' if '+' in flags else (' ' if ' ' in flags else '')
        side = '<' if '-' in flags else '>'
        if kind in 'sra':
            shown = str(value) if kind == 's' else repr(value)
            if precision:
                shown = shown[:int(precision[1:])]
            out.append(('{:' + side + width + '}').format(shown) if width else shown)
            continue
        if isinstance(value, str) and kind != 'c':
            raise TypeError('%' + kind + ' format: a real number is required, not str')
        if kind in 'diu':
            shown = ('{:' + sign + 'd}').format(int(value))
        elif kind in 'xXo':
            shown = ('{:' + sign + kind + '}').format(int(value))
        elif kind in 'eEfFgG':
            shown = ('{:' + sign + (precision or '.6') + kind + '}').format(float(value))
        elif kind == 'c':
            shown = value if isinstance(value, str) else chr(value)
        else:
            raise ValueError("unsupported format character '" + kind + "'")
        if width and '0' in flags and side == '>' and kind != 'c':
            lead = shown[0] if shown[:1] in ('+', '-', ' ') else ''
            shown = lead + shown[len(lead):].rjust(int(width) - len(lead), '0')
        elif width:
            shown = ('{:' + side + width + '}').format(shown)
        out.append(shown)
    if used < len(row) and not isinstance(values, dict):
        raise TypeError('not all arguments converted during string formatting')
    return ''.join(out)
