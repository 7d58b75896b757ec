package mirror

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/deployments"
	"kedge/sync/git/gittest"
)

// gathered returns the series of metrics whose names begin with a prefix, one on each line, sorted.
func gathered(t *testing.T, r *prometheus.Registry, prefix string) string {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), prefix) {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			value := m.GetGauge().GetValue() + m.GetCounter().GetValue()
			lines = append(lines, fmt.Sprintf("%s %s %v", f.GetName(), strings.Join(labels, ","), value))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// The leading mirror exports the state of each rollout and the numbers of nodes by state; one that waits exports
// none.
func TestUnitMetrics(t *testing.T) {
	t.Parallel()
	o, store, metrics, others := gittest.New(t), dirStore(t), prometheus.NewRegistry(), prometheus.NewRegistry()
	m := start(t, Config{Store: store, Repo: o.Bare, Metrics: metrics})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual}))
	start(t, Config{Store: store, Repo: o.Bare, Name: "mirror-2", Metrics: others})
	newHerd(t, m, 3)
	const unit = "role=web,stage=prod"
	m.await("the metrics", func() error {
		got := gathered(t, metrics, "kedge_unit")
		for _, want := range []string{"kedge_unit_generation " + unit + ",unit=app 1",
			"kedge_unit_nodes role=web,stage=prod,state=converged,unit=app 3", "kedge_unit_pinned " + unit + ",unit=app 0",
			"kedge_unit_rollout_phase phase=rolling,role=web,stage=prod,unit=app 0"} {
			if !strings.Contains(got, want) {
				return fmt.Errorf("%s lacks %s", got, want)
			}
		}
		return nil
	})
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual, "prod/web/base.yaml": unitFile("base/1")})
	m.await("the metrics of a rollout", func() error {
		got := gathered(t, metrics, "kedge_unit")
		for _, want := range []string{"kedge_unit_generation " + unit + ",unit=app 2", "kedge_unit_rollout_phase phase=canary,role=web,stage=prod,unit=app 1",
			"kedge_unit_nodes role=web,stage=prod,state=silent,unit=base 3"} {
			if !strings.Contains(got, want) {
				return fmt.Errorf("%s lacks %s", got, want)
			}
		}
		return nil
	})
	held, err := store.Presence(t.Context(), "liar")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close(context.Background())
	if err := held.Put(t.Context(), "status/prod/web/liar", []byte(`{"node":"liar","units":{"base":{"state":"`+strings.Repeat("x", 1000)+`"}}}`)); err != nil {
		t.Fatal(err)
	}
	m.await("what a live one says", func() error {
		if got := gathered(t, metrics, "kedge_unit_nodes"); strings.Contains(got, "xxx") || !strings.Contains(got, "state=other,unit=base 1") {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	if got := gathered(t, others, "kedge_unit"); got != "" {
		t.Errorf("a mirror that waits shows %s", got)
	}
	m.stop()
	if got := gathered(t, metrics, "kedge_unit"); got != "" {
		t.Errorf("a mirror that stopped shows %s", got)
	}
}

// A commit that is refused shows in the metrics of the mirror that leads, also if another mirror wrote that it is. It
// doesn't show in those of one that has ceased to lead. An invalid commit counts once.
func TestMetricsOfARefusedCommit(t *testing.T) {
	t.Parallel()
	o, store := gittest.New(t), dirStore(t)
	shows := func(m *running, r *prometheus.Registry, refused int) {
		t.Helper()
		m.await("the metrics", func() error {
			got := gathered(t, r, "kedge_mirror_")
			if !strings.Contains(got, fmt.Sprintf("kedge_mirror_refused  %d", refused)) ||
				strings.Contains(got, "kedge_mirror_head_applied_timestamp_seconds  0") != (refused == 0) {
				return errors.New(got)
			}
			return nil
		})
	}
	for i := range 2 {
		metrics := prometheus.NewRegistry()
		m := start(t, Config{Store: store, Repo: o.Bare, Metrics: metrics})
		if i == 0 {
			m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
			m.refuses(o.Push(map[string]string{"prod/web/app.yaml": "release: ?"}), "app.yaml")
		}
		shows(m, metrics, 1)
		m.await("the count", func() error {
			if got := gathered(t, metrics, "kedge_mirror_commits"); !strings.Contains(got, "result=refused 1") {
				return errors.New(got)
			}
			return nil
		})
		m.stop()
		shows(m, metrics, 0)
	}
}

// Of pins that could not be read, no unit is said to have none.
func TestUnitMetricsWithoutPins(t *testing.T) {
	t.Parallel()
	metrics := prometheus.NewRegistry()
	u := newUnitMetrics(metrics)
	unit := deployments.Unit{ID: deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}}
	u.observed.Store(&observedUnits{units: []deployments.Unit{unit}, fleet: map[deployments.RoleID][]reported{
		unit.ID.RoleID(): {{}},
	}})
	if got, want := gathered(t, metrics, "kedge_unit"),
		"kedge_unit_nodes role=web,stage=prod,state=silent,unit=app 1"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
