package reports

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"kedge/kv"
)

func entry(role, node, session, value string) kv.Entry {
	return kv.Entry{Key: kv.StatusKey("prod", role, node), Value: []byte(value), Session: session, Version: 1}
}

// full is a report of 100 units that names as little as possible of each.
func full() string {
	var units []string
	for i := range 100 {
		units = append(units, fmt.Sprintf(`"u%d":{}`, i))
	}
	return `{"units":{` + strings.Join(units, ",") + `}}`
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// However many reports of a role there are, and however much each lists, what is kept of them is bounded: without
// that, 50,000 reports of 1 KB take 2 GB. Other roles, and the shorter reports of live nodes, are read as ever.
func TestJunkReports(t *testing.T) {
	const junk = 20_000 // of 100 units each
	value := full()
	entries := make([]kv.Entry, 0, junk+2)
	for i := range junk {
		entries = append(entries, entry("web", fmt.Sprintf("a%05d", i), "thief", value))
	}
	entries = append(entries,
		entry("web", "web-1", "s", `{"units":{"app":{"state":"converged"}}}`),
		entry("db", "db-1", "s", value))
	before := heap()
	var reader Reader
	all := reader.Read(entries)
	if grown := heap() - before; grown > 600*MaxRole {
		t.Errorf("the reports take %d MB", grown>>20)
	}
	refused := 0
	for _, r := range all {
		if errors.Is(r.Err, ErrTooMuch) {
			refused++
		} else if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	if want := junk - MaxRole/100 + 1; refused != want {
		t.Errorf("%d reports are refused, want %d", refused, want)
	}
	for _, r := range all[junk:] {
		if r.Err != nil || len(r.Report.Units) == 0 {
			t.Errorf("the report of %s: %v", r.Key.Node, r.Err)
		}
	}

	// Once the junk is gone, what was refused is read.
	all = reader.Read(entries[junk-10:])
	for _, r := range all {
		if r.Err != nil {
			t.Errorf("after the junk is gone: %s: %v", r.Key.Node, r.Err)
		}
	}
	if len(reader.parsed) != len(all) {
		t.Errorf("%d reports are kept of %d", len(reader.parsed), len(all))
	}
	runtime.KeepAlive(entries)
}

// A report's lists count as its units do: each item takes more memory than bytes in the store.
func TestSizeOfReports(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]int{
		`{}`:                                   0,
		`{"units":{"a":{},"b":{}}}`:            2,
		`{"units":{"a":{"drift":["","",""]}}}`: 4,
		`{"units":{"a":{"compared":{"paths":["",""]}}}}`:                      4,
		`{"units":{"a":{"facts":{"a":"","b":""}}}}`:                           3,
		`{"facts":{"a":"","b":""}}`:                                           2,
		`{"units":{"a":{"quarantined":["` + strings.Repeat("a", 64) + `"]}}}`: 2,
	} {
		if p, err := parse([]byte(value)); err != nil || p.size != want {
			t.Errorf("%s counts as %d, want %d: %v", value, p.size, want, err)
		}
	}
}

// Live nodes come before dead ones, and short reports before long ones, whatever the names.
func TestWhoseReportsAreRead(t *testing.T) {
	const dead = MaxRole / 100
	value := full()
	var entries []kv.Entry
	for i := range dead {
		entries = append(entries, entry("web", fmt.Sprintf("a%05d", i), "", value))
	}
	entries = append(entries, entry("web", "z", "s", value))
	var reader Reader
	for i, r := range reader.Read(entries) {
		if refused := r.Err != nil; refused != (i == dead-1) {
			t.Errorf("%s: %v", r.Key.Node, r.Err)
		}
	}
}
