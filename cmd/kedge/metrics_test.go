package main

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kedge/deployments/tooltest"
)

var metricName = regexp.MustCompile(`\bkedge_(?:build|agent|mirror|unit|web)_[a-z0-9_]+`)

// served returns the names of the metrics that the code declares, those that Prometheus derives of histograms too.
func served(t *testing.T) (names, all []string) {
	t.Helper()
	declared := regexp.MustCompile(`(?:Name:\s+|NewDesc\(\s*)"(kedge_[a-z0-9_]+)"`)
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != "..":
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range declared.FindAllStringSubmatch(string(source), -1) {
			names = append(names, m[1])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		all = append(all, name, name+"_bucket", name+"_sum", name+"_count")
	}
	return names, all
}

// Each metric has its line in the manual; alerts and dashboard ask for none that nobody serves.
func TestMetricsAreKnown(t *testing.T) {
	t.Parallel()
	names, all := served(t)
	if len(names) < 20 {
		t.Fatalf("found %v", names)
	}
	read := func(file string) string {
		t.Helper()
		data, err := os.ReadFile("../../deployments/" + file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	manual := read("docs/metrics.md")
	for _, name := range names {
		if !strings.Contains(manual, "\n| `"+name+"` | ") {
			t.Errorf("the manual has no line for %s", name)
		}
	}
	for _, file := range []string{"docs/metrics.md", "alerts/kedge.rules.yaml", "alerts/kedge.rules_test.yaml", "dashboards/kedge.json"} {
		for _, name := range metricName.FindAllString(read(file), -1) {
			if !slices.Contains(all, name) {
				t.Errorf("%s names %s, which nobody serves", file, name)
			}
		}
	}
	if !json.Valid([]byte(read("dashboards/kedge.json"))) {
		t.Error("the dashboard is no JSON")
	}
	troubleshooting := read("docs/troubleshooting.md")
	for _, m := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(read("alerts/kedge.rules.yaml"), -1) {
		if !strings.Contains(troubleshooting, m[1]) {
			t.Errorf("the manual's page on troubleshooting says nothing of the alert %s", m[1])
		}
	}
}

// The alert rules parse, and fire when they should, by Prometheus' own tool.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"check", "rules", "kedge.rules.yaml"}, {"test", "rules", "kedge.rules_test.yaml"}} {
		cmd := exec.Command(tooltest.Path(t, "promtool"), args...)
		cmd.Dir = "../../deployments/alerts"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}
