package deployments

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

// What kedge.yaml says of freezes comes through mirror/state as it was, so that who reads KV alone can tell what is to
// come.
func TestFreezeWindowsThroughMirrorState(t *testing.T) {
	t.Parallel()
	tree, err := Load(fstest.MapFS{SettingsFile: {Data: []byte(`
freeze:
  - {name: weekend, deny: "0 16 * * FRI", duration: 64h, zone: Europe/Berlin, reason: nobody is there}
  - {allow: "0 9 * * MON-FRI", duration: 90m, units: [prod/*/*, "*/db/*"], running: wait}
`)}})
	if err != nil {
		t.Fatal(err)
	}
	var s MirrorState
	s.Freeze, s.FreezeOmitted = FreezeWindows(tree.Settings.Freeze)
	value, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseMirrorState(value)
	if err != nil || !back.Equal(s) {
		t.Errorf("%s is read as %+v, %v", value, back, err)
	}
	got, more := back.Freezes()
	if more != 0 || !reflect.DeepEqual(got, tree.Settings.Freeze) {
		t.Errorf("%+v and %d more, want %+v", got, more, tree.Settings.Freeze)
	}
	if other := s; true {
		other.Freeze = other.Freeze[:1]
		if s.Equal(other) {
			t.Error("a state with another window is taken for the same")
		}
	}
}

// mirror/state stays small, and says how much it leaves out.
func TestFreezeWindowsAreBounded(t *testing.T) {
	t.Parallel()
	window := Freeze{Name: strings.Repeat("ä", 1000), Kind: FreezeDeny, Cron: "0 0 * * *", Zone: time.UTC,
		Duration: time.Hour}
	units := window
	units.Units = slices.Repeat([]string{"prod/" + strings.Repeat("r", 60) + "/" + strings.Repeat("u", 60)}, 100)
	for _, c := range []struct {
		all  []Freeze
		told int
	}{
		{nil, 0}, {[]Freeze{window}, 1}, {slices.Repeat([]Freeze{window}, 1000), 80}, {slices.Repeat([]Freeze{units}, 10), 2},
		{slices.Repeat([]Freeze{{Kind: FreezeDeny, Cron: "0 0 * * *", Duration: time.Hour}}, 101), 100},
	} {
		told, more := FreezeWindows(c.all)
		value, err := json.Marshal(told)
		if len(told) != c.told || more != len(c.all)-c.told || err != nil || len(value) > maxWindowBytes {
			t.Errorf("of %d windows %d are told in %d bytes, %d more, %v; want %d", len(c.all), len(told), len(value),
				more, err, c.told)
		}
	}
}

// A window that this version can't read is counted, and no fault of the others.
func TestFreezesThatDoNotParse(t *testing.T) {
	t.Parallel()
	good := FreezeWindow{Deny: "0 16 * * FRI", Duration: "64h"}
	for name, bad := range map[string]FreezeWindow{
		"nothing":         {},
		"no duration":     {Deny: good.Deny},
		"duration":        {Deny: good.Deny, Duration: "-1h"},
		"cron":            {Deny: "0 16", Duration: "1h"},
		"cron with TZ":    {Deny: "TZ=0", Duration: "1h"},
		"a zone's path":   {Deny: good.Deny, Duration: "1h", Zone: "../../etc/passwd"},
		"a zone unknown":  {Deny: good.Deny, Duration: "1h", Zone: "Mars/Base"},
		"a unit's pieces": {Deny: good.Deny, Duration: "1h", Units: []string{"prod"}},
	} {
		all, more := MirrorState{Freeze: []FreezeWindow{bad, good}, FreezeOmitted: 3}.Freezes()
		if len(all) != 1 || more != 4 {
			t.Errorf("%s: %+v, %d more", name, all, more)
		}
	}
}
