package main

import (
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/sync/mirror"
)

// A diff says which fields of a unit file change a record that keeps its release.
func TestDiffNamesFields(t *testing.T) {
	t.Parallel()
	r := deployments.Record{Target: deployments.Pointer{URL: "s3://acme/1/manifest.yaml", Digest: deployments.Digest{1}}}
	gated, waits := r, r
	gated.Paced, gated.Drift = true, deployments.DriftHeal
	waits.After, waits.Adopt = []string{"base"}, true
	for _, c := range []struct {
		change mirror.Change
		want   string
	}{
		{mirror.Change{Kind: "create", After: &gated}, ""},
		{mirror.Change{Kind: "update", Before: &r, After: &gated}, "    changes drift, rollout\n"},
		{mirror.Change{Kind: "update", Before: &gated, After: &waits}, "    changes after, drift, adopt, rollout\n"},
		{mirror.Change{Kind: "update", Before: &r, After: &r}, ""},
		{mirror.Change{Kind: "keep", Before: &r, After: &r}, ""},
		{mirror.Change{Kind: "remove", Before: &r}, ""},
	} {
		var out strings.Builder
		writeChanges(&out, strings.Repeat("c", 40), []mirror.Change{c.change})
		got := out.String()
		if strings.Contains(got, "changes") != (c.want != "") || !strings.Contains(got, c.want) {
			t.Errorf("%+v:\n%s\nwant %q", c.change, got, c.want)
		}
	}
}
