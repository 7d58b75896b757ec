package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

const (
	digestA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func recordOf(generation, digest string) []byte {
	return []byte(`{"target":"file:///r/manifest.yaml@sha256:` + digest + `","generation":` + generation + `}`)
}

func TestSourceKeepsWhatItKnows(t *testing.T) {
	t.Parallel()
	const prefix, key = "desired/prod/web/", "desired/prod/web/app"
	now := time.Now()
	entry := func(generation, digest string) []kv.Entry {
		return []kv.Entry{{Key: key, Value: recordOf(generation, digest)}}
	}
	before := []kv.Entry{{Key: prefix + "aaa", Value: recordOf("1", digestA)}}
	after := []kv.Entry{{Key: prefix + "zzz", Value: recordOf("1", digestA)}}
	for _, c := range []struct {
		name    string
		unknown bool // nothing was known before
		view    kv.View
		want    string // the generation that decides afterwards
		from    origin
	}{
		{"trouble takes nothing away", false, kv.View{Err: kv.ErrUnavailable}, `5`, fromLastKnown},
		{"an unconfirmed older record doesn't count", false, kv.View{Entries: entry("4", digestA), Err: kv.ErrDenied}, `5`, fromLastKnown},
		{"an unconfirmed other record of the same generation doesn't count", false, kv.View{Entries: entry("5", digestB), Err: kv.ErrDenied}, `5`, fromLastKnown},
		{"an unconfirmed newer record counts", false, kv.View{Entries: entry("6", digestA), Err: kv.ErrDenied}, `6`, fromLastKnown},
		{"beside others, in any order", false, kv.View{Entries: slices.Concat(after, entry("6", digestA), before), Err: kv.ErrDenied}, `6`, fromLastKnown},
		{"a confirmed older record is held", false, kv.View{Entries: entry("4", digestA), Synced: true}, `5`, fromStore},
		{"beside others, in any order, too", false, kv.View{Entries: slices.Concat(after, entry("4", digestA), before), Synced: true}, `5`, fromStore},
		{"a confirmed one of the same generation counts", false, kv.View{Entries: entry("5", digestA), Synced: true}, `5`, fromStore},
		{"a confirmed newer record counts", false, kv.View{Entries: entry("6", digestA), Synced: true}, `6`, fromStore},
		{"a synced absence wins", false, kv.View{Synced: true}, ``, fromStore},
		{"where nothing is known an unconfirmed record is a beginning", true, kv.View{Entries: entry("4", digestA), Err: kv.ErrDenied}, `4`, fromStore},
		{"where nothing is known an unconfirmed absence says nothing", true, kv.View{Err: kv.ErrDenied}, ``, fromNowhere},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newRole("prod", "web").Records
			if !c.unknown {
				s.offer(entry("5", digestA), fromLastKnown, now)
			}
			s.accept(c.view, concerns(prefix, "n1"), now, quiet())
			got := ""
			if e, ok := s.find(key); ok {
				if strings.Contains(string(e.Value), digestB) {
					t.Error("a record that doesn't count decides")
				}
				_, got, _ = strings.Cut(string(e.Value), `"generation":`)
				got = strings.TrimSuffix(got, "}")
			}
			if got != c.want || s.from != c.from {
				t.Errorf("generation %q from %v decides, want %q from %v", got, s.from, c.want, c.from)
			}
		})
	}
}

// The highest generation that a node has acted on outlives the record: a record from a restored backup waits for a
// mirror, and a bare pointer that a mirror would undo has to stand.
func TestRecordsThatHaveToWait(t *testing.T) {
	t.Parallel()
	const key = "desired/prod/web/app"
	pointer := "file:///r@sha256:" + strings.Repeat("a", 64)
	record := func(generation int) string { return fmt.Sprintf(`{"target":%q,"generation":%d}`, pointer, generation) }
	now := time.Now()
	s := newRole("prod", "web").Records
	view := func(value string) string {
		v := kv.View{Synced: true}
		if value != "" {
			v.Entries = []kv.Entry{{Key: key, Value: []byte(value)}}
		}
		s.accept(v, concerns(s.Prefix, "n1"), now, quiet())
		e, _ := s.find(key)
		return string(e.Value)
	}
	for _, step := range []struct{ value, want string }{
		{record(7), record(7)},
		{record(3), record(7)},
		{"", ""},
		{record(3), ""},
		{record(7), record(7)},
		{pointer, record(7)},
		{record(8), record(8)},
		{pointer, record(8)},
	} {
		if got := view(step.value); got != step.want {
			t.Fatalf("the store has %q, and %q decides, want %q", step.value, got, step.want)
		}
	}
	if s.recheck != now.Add(bareWait) || s.review(now.Add(bareWait-1), quiet()) {
		t.Errorf("the bare pointer counts at %v, want %v", s.recheck, now.Add(bareWait))
	}
	if e, _ := s.find(key); !s.review(now.Add(bareWait), quiet()) {
		t.Errorf("the bare pointer never counts: %s", e.Value)
	}
	if got := view(record(7)); got != pointer {
		t.Errorf("after it, %q decides", got)
	}

	// A restart knows the same.
	k := lastKnown{Format: 1, Prefixes: map[string]knownEntries{}}
	k.set(s.Prefix, nil, s.actedOn, now)
	if k.Prefixes[s.Prefix].Generations[key] != 8 {
		t.Errorf("on disk: %v", k.Prefixes)
	}
}

func TestPinsNeedASyncedView(t *testing.T) {
	t.Parallel()
	s := newRole("prod", "web").Pins
	for _, entries := range [][]kv.Entry{nil, {{Key: "pins/prod/web/app", Value: []byte("hold")}}} {
		if s.accept(kv.View{Entries: entries, Err: kv.ErrDenied}, concerns(s.Prefix, "n1"), time.Now(), quiet()) ||
			s.from != fromNowhere ||
			len(s.entries) > 0 {
			t.Errorf("a refused read was taken for all pins that there are: %v", entries)
		}
	}
	if s.offer(nil, fromSnapshot, time.Now()); s.from != fromSnapshot {
		t.Error("a snapshot was not taken where nothing is known")
	}
	// That there are none has to be in the last known state too.
	if !s.accept(kv.View{Synced: true}, concerns(s.Prefix, "n1"), time.Now(), quiet()) {
		t.Error("that the store has no pins is no news")
	}
	if s.accept(kv.View{Synced: true}, concerns(s.Prefix, "n1"), time.Now(), quiet()) {
		t.Error("the same again is news")
	}
	if s.from != fromStore || s.offer(nil, fromSnapshot, time.Now()) {
		t.Error("a snapshot counts for more than the store")
	}
}

// New records are sorted in among the known ones, and nothing is decided before both records and pins are known.
func TestNothingIsDecidedWithoutPins(t *testing.T) {
	t.Parallel()
	r := newRole("prod", "web")
	records := func(names ...string) (entries []kv.Entry) {
		for _, name := range names {
			entries = append(entries, kv.Entry{Key: r.Records.Prefix + name, Value: recordOf("1", digestA)})
		}
		return entries
	}
	unconfirmed := func(entries []kv.Entry) {
		r.Records.accept(kv.View{Entries: entries, Err: kv.ErrDenied}, concerns(r.Records.Prefix, "n1"), time.Now(), quiet())
	}
	if r.Known() || unknown(r) != "waiting for the store's first answer for desired/prod/web/" {
		t.Errorf("known %v: %s", r.Known(), unknown(r))
	}
	unconfirmed(nil)
	if r.Known() || !strings.Contains(unknown(r), "nothing is known of desired/prod/web/ yet: ") {
		t.Errorf("known %v: %s", r.Known(), unknown(r))
	}
	unconfirmed(records("app", "db"))
	unconfirmed(records("base", "aaa"))
	for _, e := range records("aaa", "app", "base", "db") {
		if _, ok := r.Records.find(e.Key); !ok {
			t.Errorf("%s isn't known", e.Key)
		}
	}
	if r.Known() || unknown(r) != "waiting for the store's first answer for pins/prod/web/" {
		t.Errorf("known %v: %s", r.Known(), unknown(r))
	}
	r.Pins.accept(kv.View{Synced: true}, concerns(r.Pins.Prefix, "n1"), time.Now(), quiet())
	if !r.Known() || unknown(r) != "" {
		t.Errorf("known %v: %s", r.Known(), unknown(r))
	}
	only := newRole("prod", "web")
	only.Pins.accept(kv.View{Synced: true}, concerns(only.Pins.Prefix, "n1"), time.Now(), quiet())
	if only.Known() {
		t.Error("with pins alone, records are known")
	}
}

func TestMine(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]bool{
		"pins/prod/web/app": true, "pins/prod/web/app/n1": true, "pins/prod/web/app/n2": false,
		"pins/prod/web/": false, "pins/prod/webx/app": false, "pins/prod/web/app/n1/x": false,
	} {
		if got := concerns("pins/prod/web/", "n1")(key); got != want {
			t.Errorf("concerns(%q) = %v", key, got)
		}
	}
}

func TestUnitsAreThoseWithRecord(t *testing.T) {
	t.Parallel()
	r := newRole("prod", "web")
	r.Records.offer([]kv.Entry{{Key: "desired/prod/web/..bad"}, {Key: "desired/prod/web/app"}}, fromStore, time.Now())
	r.Pins.offer([]kv.Entry{{Key: "pins/prod/web/app"}, {Key: "pins/prod/web/base/n1"}}, fromStore, time.Now())
	var got []string
	for _, id := range r.Units() {
		got = append(got, id.Unit)
	}
	if strings.Join(got, " ") != "app" {
		t.Errorf("units are %q", got)
	}
}

func TestLastKnownSurvives(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "last-known.json")
	k, err := readLastKnown(file, quiet())
	if err != nil {
		t.Fatal(err)
	}
	entries := []kv.Entry{{Key: "desired/prod/web/app", Value: []byte("\xff\x00 raw\r\n")}}
	now := time.Now().Truncate(0)
	if !k.set("desired/prod/web/", entries, nil, now) || !k.set("pins/prod/web/", nil, nil, now) {
		t.Fatal("news are no news")
	}
	if k.set("desired/prod/web/", entries, nil, now.Add(time.Hour)) || k.set("pins/prod/web/", nil, nil, now) {
		t.Error("the same again is news")
	}
	if err := k.write(file); err != nil {
		t.Fatal(err)
	}
	again, err := readLastKnown(file, quiet())
	if err != nil {
		t.Fatal(err)
	}
	got, at, ok := again.get("desired/prod/web/")
	if !ok || !equalEntries(got, entries) || !at.Equal(now) {
		t.Errorf("read back %v of %v", got, at)
	}
	if got, _, ok := again.get("pins/prod/web/"); !ok || len(got) != 0 {
		t.Errorf("that there are no pins is not known any more: %v", got)
	}
	if _, _, ok := again.get("pins/prod/db/"); ok {
		t.Error("a prefix is known that was never seen")
	}
}

// A failed save is retried by itself, as nothing else may happen before the restart that needs it.
func TestLastKnownIsTriedAgain(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	c, err := Open(Config{
		Node: "n1", Stage: "prod", Roles: []string{"web"}, File: filepath.Join(dir, "last-known.json"), Log: quiet(),
		Kept: func(deployments.UnitID) bool { return false },
	})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c.See(c.Role("web").Records, kv.View{Synced: true}, now)
	for range 2 {
		if next := c.Save(now); !next.After(now) || next.After(now.Add(time.Minute)) {
			t.Errorf("the next try is at %v, now it is %v", next, now)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if next := c.Save(now); !next.IsZero() {
		t.Errorf("it is written, and the next try is at %v", next)
	}
	if _, err := os.Stat(filepath.Join(dir, "last-known.json")); err != nil {
		t.Error(err)
	}
}

// The last known pins were chosen by the node's name: after another name is known, a restart must not take them for all
// that there are.
func TestRenamingForgetsPinsOnDisk(t *testing.T) {
	t.Parallel()
	config := Config{
		Node: "old", Stage: "prod", Roles: []string{"web"}, File: filepath.Join(t.TempDir(), "last-known.json"),
		Log: quiet(), Kept: func(deployments.UnitID) bool { return false },
	}
	open := func() *Cache {
		c, err := Open(config)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	now := time.Now()
	c := open()
	for _, s := range c.Role("web").Sources() {
		c.See(s, kv.View{Synced: true}, now)
	}
	c.Save(now)
	if c = open(); !c.Role("web").Known() {
		t.Error("after a restart, the last known state doesn't count")
	}
	wantRecordsAlone := func(after string) {
		t.Helper()
		if c = open(); c.Role("web").Known() || c.Role("web").Records.from != fromLastKnown {
			t.Errorf("%s: records from %v, pins from %v", after, c.Role("web").Records.from, c.Role("web").Pins.from)
		}
	}
	c.Rename("new")
	config.Node = "new"
	wantRecordsAlone("killed before the new name was saved here")
	c.Save(now)
	wantRecordsAlone("once it was saved")
	for _, s := range c.Role("web").Sources() {
		c.See(s, kv.View{Synced: true}, now)
	}
	if next := c.Save(now); !next.IsZero() {
		t.Errorf("the next try to save is at %v", next)
	}
	if c = open(); !c.Role("web").Known() {
		t.Error("what was seen under the new name doesn't count after a restart")
	}
	config.Node = "third"
	wantRecordsAlone("named anew in the configuration, or copied to another host")
}

func TestDamagedFilesArePutAside(t *testing.T) {
	t.Parallel()
	for _, data := range []string{"", "{", "\x00\x00\x00", `{"format":2}`, `{"format":2,"prefixes":{},"units":{}}`, "null"} {
		dir := t.TempDir()
		for _, name := range []string{"last-known.json"} {
			write(t, dir+"/"+name, data)
		}
		if k, err := readLastKnown(dir+"/last-known.json", quiet()); err != nil || k.Prefixes == nil {
			t.Errorf("last known state %q: %v", data, err)
		}
		for _, name := range []string{"last-known.json"} {
			if kept, err := os.ReadFile(dir + "/" + name + ".bad"); err != nil || string(kept) != data {
				t.Errorf("%s was not kept: %q, %v", name, kept, err)
			}
			if _, err := os.Stat(dir + "/" + name); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is still there: %v", name, err)
			}
		}
	}
}

// Every change is saved, even if it isn't logged: otherwise a removed pin would come back while the store is away.
func TestLastKnownTakesEveryChange(t *testing.T) {
	t.Parallel()
	const prefix = "pins/prod/web/"
	entry := func(key, value string) kv.Entry { return kv.Entry{Key: prefix + key, Value: []byte(value)} }
	was := []kv.Entry{entry("app", "1"), entry("base", "1")}
	for name, now := range map[string][]kv.Entry{
		"the first is another": {entry("app", "2"), entry("base", "1")},
		"the last is another":  {entry("app", "1"), entry("base", "2")},
		"one is gone":          {entry("app", "1")},
		"all are gone":         nil,
		"one has come":         {entry("app", "1"), entry("base", "1"), entry("db", "1")},
		"one is renamed":       {entry("app", "1"), entry("db", "1")},
		"one is empty":         {entry("app", "1"), entry("base", "")},
	} {
		k := lastKnown{Format: 1, Prefixes: map[string]knownEntries{}}
		k.set(prefix, was, nil, time.Now())
		if !k.set(prefix, now, nil, time.Now()) {
			t.Errorf("%s: that is no news", name)
		}
		if got, _, _ := k.get(prefix); !equalEntries(got, now) {
			t.Errorf("%s: known is %v", name, got)
		}
	}
}

// Fields that the format allows to be missing are no damage.
func TestFilesWithNothingInThem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"last-known.json"} {
		write(t, dir+"/"+name, `{"format":1}`)
	}
	file := filepath.Join(dir, "last-known.json")
	k, err := readLastKnown(file, quiet())
	if err != nil || !k.set("pins/prod/web/", nil, nil, time.Now()) {
		t.Errorf("last known state: %v", err)
	}
}

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// unknown returns what is missing of a role, in words.
func unknown(r *Role) string {
	if err := r.Unknown(); err != nil {
		return err.Error()
	}
	return ""
}
