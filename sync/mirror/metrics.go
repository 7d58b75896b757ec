package mirror

import (
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/deployments"
	"kedge/policy"
)

// metrics are the metrics that a mirror updates as it works.
type metrics struct {
	leading prometheus.Gauge
	at      prometheus.Gauge
	refused prometheus.Gauge
	polls   *prometheus.CounterVec
	commits *prometheus.CounterVec
	keys    prometheus.Counter
	hooks   *prometheus.CounterVec
	read    prometheus.Gauge
	rounds  prometheus.Histogram
}

// newMetrics registers the metrics with r; nil: nowhere.
func newMetrics(r *prometheus.Registry) *metrics {
	m := &metrics{
		leading: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_leader",
			Help: "1 while this mirror holds the lease."}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_head_applied_timestamp_seconds",
			Help: "When the commit that the store holds was written there."}),
		refused: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_refused",
			Help: "1 while the branch's newest commit is refused."}),
		polls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kedge_mirror_polls_total",
			Help: "Reads of the branch in Git, by result."}, []string{"result"}),
		commits: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kedge_mirror_commits_total",
			Help: "New commits, by whether they were taken."}, []string{"result"}),
		keys: prometheus.NewCounter(prometheus.CounterOpts{Name: "kedge_mirror_keys_written_total",
			Help: "Operations in the transactions that the store took."}),
		hooks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kedge_mirror_webhooks_total",
			Help: "Requests to the mirror's /hook, by the HTTP status of the answer."}, []string{"code"}),
		read: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_last_poll_success_timestamp_seconds",
			Help: "When the branch was last read from Git."}),
		rounds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kedge_mirror_reconcile_duration_seconds",
			Help:    "How long it took to compare Git with the store and to write the difference.",
			Buckets: []float64{.001, .01, .1, 1, 10, 60}}),
	}
	if r != nil {
		r.MustRegister(m.leading, m.at, m.refused, m.polls, m.commits, m.keys, m.hooks, m.read, m.rounds)
	}
	return m
}

func resultOf(err error, good, bad string) string {
	if err != nil {
		return bad
	}
	return good
}

func (m *metrics) countPoll(err error) {
	m.polls.WithLabelValues(resultOf(err, "ok", "error")).Inc()
	if err == nil {
		m.read.SetToCurrentTime()
	}
}

func (m *metrics) countCommit(err error) {
	m.commits.WithLabelValues(resultOf(err, "taken", "refused")).Inc()
}

func (m *metrics) countOps(ops int) { m.keys.Add(float64(ops)) }

// setLeading exports whether this mirror holds the lease. If this mirror doesn't, setLeading resets
// what setState exported, as that may no longer be true.
func (m *metrics) setLeading(leading bool) {
	m.leading.Set(oneIf(leading))
	if !leading {
		m.setState(deployments.MirrorState{})
	}
}

// setState exports what mirror/state holds.
func (m *metrics) setState(s deployments.MirrorState) {
	at := 0.0
	if !s.At.IsZero() {
		at = float64(s.At.UnixMilli()) / 1000
	}
	m.at.Set(at)
	m.refused.Set(oneIf(s.Refused != ""))
}

// countWebhook counts a webhook by the HTTP status that answered it.
func (m *metrics) countWebhook(status int) { m.hooks.WithLabelValues(strconv.Itoa(status)).Inc() }

// observedUnits is the state of units and nodes that the leading mirror last saw. It is immutable.
type observedUnits struct {
	units []deployments.Unit
	cells map[deployments.UnitID]cell
	fleet map[deployments.RoleID][]reported
	pins  map[deployments.UnitID]policy.Value[deployments.Pin] // of whole units; nil: they aren't known
}

// unitMetrics exports the state of rollouts and what nodes report, as counted at each scrape. Only
// the mirror that leads exports these metrics, so that sums over all mirrors are right.
type unitMetrics struct {
	observed                                              atomic.Pointer[observedUnits] // nil: there's nothing to export
	generation, rollout, orphaned, pinned, pinEnds, nodes *prometheus.Desc
}

// newUnitMetrics registers the metrics with r; nil: nowhere.
func newUnitMetrics(r *prometheus.Registry) *unitMetrics {
	unit := []string{"stage", "role", "unit"}
	u := &unitMetrics{
		generation: prometheus.NewDesc("kedge_unit_generation", "The generation of a unit's record.",
			unit, nil),
		rollout: prometheus.NewDesc("kedge_unit_rollout_phase",
			"1 for the phase in which a unit's rollout is, 0 for every other.", append(unit, "phase"), nil),
		orphaned: prometheus.NewDesc("kedge_unit_orphaned", "1 while Git names the unit no longer, and its record stays.",
			unit, nil),
		pinned:  prometheus.NewDesc("kedge_unit_pinned", "1 while a pin of the whole unit decides.", unit, nil),
		pinEnds: prometheus.NewDesc("kedge_unit_pin_end_timestamp_seconds", "When the unit's pin ends by itself.", unit, nil),
		nodes: prometheus.NewDesc(
			"kedge_unit_nodes",
			"Nodes by the state that they report of a unit: converged, waiting, fetching, switching, retrying, "+
				"quarantined, held, unhealthy or invalid; silent if they have not reported on it, gone if they died, "+
				"other for any other state.",
			append(unit, "state"),
			nil,
		),
	}
	if r != nil {
		r.MustRegister(u)
	}
	return u
}

func (u *unitMetrics) Describe(to chan<- *prometheus.Desc) {
	to <- u.generation
	to <- u.rollout
	to <- u.orphaned
	to <- u.pinned
	to <- u.pinEnds
	to <- u.nodes
}

func (u *unitMetrics) Collect(to chan<- prometheus.Metric) {
	s := u.observed.Load()
	if s == nil {
		return
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	for id, c := range s.cells {
		if c.present && c.err == nil && c.record.Orphaned {
			gauge(u.orphaned, 1, id.Stage, id.Role, id.Unit)
		}
	}
	for _, unit := range s.units {
		id := unit.ID
		if c := s.cells[id]; c.present && c.err == nil {
			gauge(u.generation, float64(c.record.Generation), id.Stage, id.Role, id.Unit)
			for _, phase := range deployments.Phases() {
				is := c.record.Rollout != nil && c.record.Rollout.Phase == phase
				gauge(u.rollout, oneIf(is), id.Stage, id.Role, id.Unit, string(phase))
			}
		}
		pin := s.pins[id]
		if s.pins != nil {
			gauge(u.pinned, oneIf(pin.Present && !pin.Value.Expired(time.Now())), id.Stage, id.Role, id.Unit)
		}
		if !pin.Value.Until.IsZero() {
			gauge(u.pinEnds, float64(pin.Value.Until.Unix()), id.Stage, id.Role, id.Unit)
		}
		count := map[string]int{}
		for _, n := range s.fleet[id.RoleID()] {
			switch report, spoke := n.report.Units[id.Unit]; {
			case n.gone:
				count["gone"]++
			case !spoke:
				count["silent"]++
			case !report.State.Known(): // a node must not choose labels
				count["other"]++
			default:
				count[string(report.State)]++
			}
		}
		for state, n := range count {
			gauge(u.nodes, float64(n), id.Stage, id.Role, id.Unit, state)
		}
	}
}

func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
