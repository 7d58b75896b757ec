package cache

import (
	"slices"
	"strings"
	"testing"
)

func TestTakeUnits(t *testing.T) {
	t.Parallel()
	of := func(names string) func(string) bool {
		return func(name string) bool { return strings.Contains(names, name) }
	}
	for names, want := range map[string]string{"a": "a", "c b a": "a b", "z y x a": "y z", "z y": "y z"} {
		taken, left := takeUnits(strings.Fields(names), of("z"), of("y"), 2)
		var got []string
		for name := range taken {
			got = append(got, name)
		}
		slices.Sort(got)
		if strings.Join(got, " ") != want || left != max(0, len(strings.Fields(names))-2) {
			t.Errorf("of %s are taken %v, %d left out; want %s", names, got, left, want)
		}
	}
}
