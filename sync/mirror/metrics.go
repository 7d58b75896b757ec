package mirror

import (
	"github.com/prometheus/client_golang/prometheus"

	"kedge/deployments"
)

// metrics are what /metrics shows of a mirror.
type metrics struct {
	leader  prometheus.Gauge
	at      prometheus.Gauge
	refused prometheus.Gauge
	polls   *prometheus.CounterVec
	commits *prometheus.CounterVec
	keys    prometheus.Counter
	hooks   *prometheus.CounterVec
	read    prometheus.Gauge
	rounds  prometheus.Histogram
}

// newMetrics registers with r; nil: nowhere.
func newMetrics(r *prometheus.Registry) *metrics {
	m := &metrics{
		leader: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_leader",
			Help: "1 while this mirror holds the lease."}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_head_applied_timestamp_seconds",
			Help: "When the commit that the store holds was written there."}),
		refused: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_refused",
			Help: "1 while the branch's newest commit is not taken."}),
		polls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kedge_mirror_polls_total",
			Help: "Looks at the branch, by result."}, []string{"result"}),
		commits: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kedge_mirror_commits_total",
			Help: "New commits, by whether they were taken."}, []string{"result"}),
		keys: prometheus.NewCounter(prometheus.CounterOpts{Name: "kedge_mirror_keys_written_total",
			Help: "Operations in the transactions that the store took."}),
		hooks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kedge_mirror_webhooks_total",
			Help: "Webhooks, by HTTP status."}, []string{"code"}),
		read: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_mirror_last_poll_success_timestamp_seconds",
			Help: "When the branch was last read from Git."}),
		rounds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kedge_mirror_reconcile_duration_seconds",
			Help:    "How long it took to compare Git with the store and to write the difference.",
			Buckets: []float64{.001, .01, .1, 1, 10, 60}}),
	}
	if r != nil {
		r.MustRegister(m.leader, m.at, m.refused, m.polls, m.commits, m.keys, m.hooks, m.read, m.rounds)
	}
	return m
}

func result(err error, good, bad string) string {
	if err != nil {
		return bad
	}
	return good
}

func (m *metrics) polled(err error) {
	m.polls.WithLabelValues(result(err, "ok", "error")).Inc()
	if err == nil {
		m.read.SetToCurrentTime()
	}
}

func (m *metrics) judged(err error) { m.commits.WithLabelValues(result(err, "taken", "refused")).Inc() }
func (m *metrics) wrote(ops int)    { m.keys.Add(float64(ops)) }

func (m *metrics) led(leading bool) {
	m.leader.Set(0)
	if leading {
		m.leader.Set(1)
	}
}

func (m *metrics) applied(s deployments.MirrorState) {
	m.at.Set(float64(s.At.UnixMilli()) / 1000)
	m.refused.Set(0)
	if s.Refused != "" {
		m.refused.Set(1)
	}
}
