package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
	"testing"

	"kedge/artifact/treetest"
)

// opsOf gives ops: seek, add and extra of each.
func opsOf(ops ...int64) (out []byte) {
	for i, n := range ops {
		if i%3 == 0 {
			out = binary.AppendVarint(out, n)
		} else {
			out = binary.AppendUvarint(out, uint64(n))
		}
	}
	return out
}

// A patch that does not fit is passed over; one that isn't whole is the delta's end. Neither makes anything.
func TestHostilePatches(t *testing.T) {
	t.Parallel()
	old := []byte("0123456789")
	three := []byte{3, 0}
	type patch struct {
		ops, runs, differ, extra []byte
		makes                    string
		err                      error
	}
	for name, c := range map[string]patch{
		"old bytes":                  {opsOf(2, 3, 0), three, nil, nil, "234", nil},
		"to the end":                 {opsOf(7, 3, 0), three, nil, nil, "789", nil},
		"back again":                 {opsOf(1, 2, 0, -3, 1, 0), three, nil, nil, "120", nil},
		"changed bytes":              {opsOf(0, 3, 0), []byte{1, 1, 1, 0}, []byte{1}, nil, "022", nil},
		"new bytes":                  {opsOf(0, 1, 2), []byte{1, 0}, nil, []byte("ab"), "0ab", nil},
		"before the file":            {opsOf(-1, 3, 0), three, nil, nil, "", ErrNotApplied},
		"behind the file":            {opsOf(8, 3, 0), three, nil, nil, "", ErrNotApplied},
		"far behind":                 {opsOf(math.MaxInt64, 3, 0), three, nil, nil, "", ErrNotApplied},
		"far before":                 {opsOf(math.MinInt64, 3, 0), three, nil, nil, "", ErrNotApplied},
		"far behind what was read":   {opsOf(1, 2, 0, math.MaxInt64, 1, 0), three, nil, nil, "", ErrNotApplied},
		"an op of nothing":           {opsOf(0, 0, 0, 0, 3, 0), three, nil, nil, "", ErrNotApplied},
		"an op of too much":          {opsOf(0, 4, 0), []byte{4, 0}, nil, nil, "", ErrNotApplied},
		"an op of too much new":      {opsOf(0, 2, 2), []byte{2, 0}, nil, []byte("ab"), "", ErrNotApplied},
		"no op":                      {nil, three, nil, nil, "", ErrNotApplied},
		"half an op":                 {opsOf(0, 3, 0)[:2], three, nil, nil, "", ErrNotApplied},
		"an op too many":             {opsOf(0, 3, 0, 0, 1, 0), three, nil, nil, "", ErrNotApplied},
		"a run of nothing":           {opsOf(0, 3, 0), []byte{0, 0, 3, 0}, nil, nil, "", ErrNotApplied},
		"no run":                     {opsOf(0, 3, 0), nil, nil, nil, "", ErrNotApplied},
		"a run of too much":          {opsOf(0, 3, 0), []byte{4, 0}, nil, nil, "", ErrNotApplied},
		"a run too many":             {opsOf(0, 3, 0), []byte{3, 0, 1, 0}, nil, nil, "", ErrNotApplied},
		"too few changes":            {opsOf(0, 3, 0), []byte{0, 3}, []byte{1, 1}, nil, "", ErrNotApplied},
		"too many changes":           {opsOf(0, 3, 0), []byte{2, 1}, []byte{1, 1}, nil, "", ErrNotApplied},
		"too few new":                {opsOf(0, 1, 2), []byte{1, 0}, nil, []byte("a"), "", ErrNotApplied},
		"too many new":               {opsOf(0, 1, 2), []byte{1, 0}, nil, []byte("abc"), "", ErrNotApplied},
		"more new than the file has": {opsOf(0, 3, 0), three, nil, []byte("abcd"), "", ErrDelta},
		"more changes than that":     {opsOf(0, 3, 0), three, []byte("abcd"), nil, "", ErrDelta},
		"more ops than may be":       {make([]byte, 36), three, nil, nil, "", ErrDelta},
		"more runs than may be":      {opsOf(0, 3, 0), make([]byte, 39), nil, nil, "", ErrDelta},
	} {
		var data []byte
		for _, part := range [][]byte{c.ops, c.runs, c.differ, c.extra} {
			data = binary.AppendUvarint(data, uint64(len(part)))
		}
		data = slices.Concat(data, c.ops, c.runs, c.differ, c.extra)
		d := newPlainDelta(append(data, "rest"...))
		var out bytes.Buffer
		if err := d.Apply(bytes.NewReader(old), int64(len(old)), &out, 3); !errors.Is(err, c.err) || out.String() != c.makes {
			t.Errorf("%s: it makes %q, %v", name, out.String(), err)
		}
		if rest, _ := io.ReadAll(d.stream); c.err != ErrDelta && string(rest) != "rest" {
			t.Errorf("%s: %q is left to read", name, rest)
		}
		for n := range data {
			out.Reset()
			if err := newPlainDelta(data[:n]).Apply(bytes.NewReader(old), int64(len(old)), &out, 3); !errors.Is(err,
				ErrDelta) || out.Len() > 0 {
				t.Errorf("%s, cut at %d: it makes %q, %v", name, n, out.String(), err)
			}
		}
	}
}

// A file that is shorter than it was said to be is one that a patch does not fit.
func TestPatchOfAShorterFile(t *testing.T) {
	t.Parallel()
	old := treetest.Random(1, 1<<20)
	new := slices.Concat(old[700_000:], old[:700_000]) // forwards and back
	patch := appendPatch(nil, newMatcher(old), old, new)
	for _, left := range []int{len(old), len(old) - 1, 300_000, 0} {
		var out bytes.Buffer
		err := newPlainDelta(patch).Apply(bytes.NewReader(old[:left]), int64(len(old)), &out, int64(len(new)))
		if whole := left == len(old); whole && (err != nil || !bytes.Equal(out.Bytes(), new)) || !whole && !errors.Is(err,
			ErrNotApplied) {
			t.Errorf("with %d bytes of %d: %v", left, len(old), err)
		}
	}
}
