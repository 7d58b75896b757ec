package artifact

import (
	"slices"
	"testing"
)

func TestVersionsAreOrderedAsPeopleCount(t *testing.T) {
	t.Parallel()
	want := []string{"", "1", "1.2", "1.9", "1.9-rc2", "1.9.0", "1.10", "1.10.1", "2.0", "2024-11-09", "2024-11-10", "v1", "v02", "v10"}
	for seed := range 3 {
		got := slices.Clone(want)
		slices.Reverse(got[:len(got)-seed])
		slices.SortFunc(got, compareVersions)
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
