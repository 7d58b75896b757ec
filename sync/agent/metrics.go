package agent

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/deployments"
	"kedge/sync/deploy"
)

// metrics are the metrics that the agent updates as it works; see gauges for the others. All methods work without a
// registry.
type metrics struct {
	jobs        *prometheus.CounterVec
	duration    *prometheus.HistogramVec
	lastSuccess *prometheus.GaugeVec
	reconcile   prometheus.Histogram
	reports     prometheus.Counter
}

func newMetrics(r *prometheus.Registry) *metrics {
	m := &metrics{
		jobs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kedge_agent_jobs_total",
			Help: "What the agent did for a unit, by kind (deploy, forget, forget-before, heal, inspect-dest, leave, observe, " +
				"prove, raise-floor, recover, stage, verify) and result (ok, failed, retried, refused, superseded).",
		}, []string{"role", "unit", "kind", "result"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kedge_agent_deploy_duration_seconds", Help: "Seconds of each successful deployment, from its start until " +
				"the release was healthy, with the fetching of what was not staged before.",
			Buckets: []float64{.01, .05, .1, .5, 1, 5, 15, 60, 300, 1800},
		}, []string{"role", "unit"}),
		lastSuccess: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kedge_agent_last_deploy_success_timestamp_seconds", Help: "When a deployment of the unit last succeeded.",
		}, []string{"role", "unit"}),
		reconcile: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kedge_agent_reconcile_duration_seconds", Help: "How long it took to decide what every unit should run.",
			Buckets: []float64{.0001, .001, .01, .1, 1},
		}),
		reports: prometheus.NewCounter(
			prometheus.CounterOpts{Name: "kedge_agent_reports_total", Help: "Reports written into the store."},
		),
	}
	if r != nil {
		r.MustRegister(m.jobs, m.duration, m.lastSuccess, m.reconcile, m.reports)
	}
	return m
}

func (m *metrics) ended(id deployments.UnitID, kind string, deploys bool, err error, calledOff bool,
	took time.Duration) {
	result := "ok"
	switch {
	case err == nil && deploys:
		m.duration.WithLabelValues(id.Role, id.Unit).Observe(took.Seconds())
		m.lastSuccess.WithLabelValues(id.Role, id.Unit).SetToCurrentTime()
	case err == nil:
	case errors.As(err, new(*deploy.Failed)), errors.Is(err, deploy.ErrQuarantined):
		result = "failed"
	case errors.Is(err, deploy.ErrRefused):
		result = "refused"
	case calledOff:
		result = "superseded"
	default:
		result = "retried"
	}
	m.jobs.WithLabelValues(id.Role, id.Unit, kind, result).Inc()
}

// drop removes the series of a unit that is gone.
func (m *metrics) drop(id deployments.UnitID) {
	labels := prometheus.Labels{"role": id.Role, "unit": id.Unit}
	m.jobs.DeletePartialMatch(labels)
	m.duration.DeletePartialMatch(labels)
	m.lastSuccess.DeletePartialMatch(labels)
}

func (m *metrics) wroteReport() { m.reports.Inc() }

// gauges are the metrics that are computed at each scrape.
type gauges struct {
	reports func() map[string]deployments.Report
	fetched func() (requests int64, bytes int64)
	storeUp func() map[string]bool
}

var (
	readyGauge = prometheus.NewDesc("kedge_agent_ready", "1 while /ready answers 200.", nil, nil)
	stateGauge = prometheus.NewDesc("kedge_agent_unit_state", "1 for the state that a unit is in, 0 for every other.",
		[]string{"role", "unit", "state"}, nil)
	infoGauge = prometheus.NewDesc("kedge_agent_unit_info", "1, with the release that a unit runs.",
		[]string{"role", "unit", "version", "digest"}, nil)
	driftGauge = prometheus.NewDesc("kedge_agent_unit_drift_files",
		"Files of the live tree that differ from the release, as far as a report names them (at most 5).",
		[]string{"role", "unit"}, nil)
	storeGauge = prometheus.NewDesc("kedge_agent_store_up", "1 while the view of a prefix is up to date.",
		[]string{"prefix"}, nil)
	fetchedGauge = prometheus.NewDesc("kedge_agent_fetched_bytes_total", "Bytes read from storage.", nil, nil)
)

func (g gauges) Describe(c chan<- *prometheus.Desc) {
	c <- readyGauge
	c <- stateGauge
	c <- infoGauge
	c <- driftGauge
	c <- storeGauge
	c <- fetchedGauge
}

func (g gauges) Collect(c chan<- prometheus.Metric) {
	_, bytes := g.fetched()
	c <- prometheus.MustNewConstMetric(fetchedGauge, prometheus.CounterValue, float64(bytes))
	for prefix, up := range g.storeUp() {
		c <- prometheus.MustNewConstMetric(storeGauge, prometheus.GaugeValue, value(up), prefix)
	}
	ready := false
	for role, r := range g.reports() {
		ready = ready || r.Ready
		for name, u := range r.Units {
			digest := ""
			if !u.Running.IsZero() {
				digest = u.Running.Digest.Short()
			}
			c <- prometheus.MustNewConstMetric(infoGauge, prometheus.GaugeValue, 1, role, name, u.Version, digest)
			c <- prometheus.MustNewConstMetric(driftGauge, prometheus.GaugeValue, float64(len(u.Drift)), role, name)
			for _, state := range deployments.States() {
				is := value(state == u.State)
				c <- prometheus.MustNewConstMetric(stateGauge, prometheus.GaugeValue, is, role, name, string(state))
			}
		}
	}
	c <- prometheus.MustNewConstMetric(readyGauge, prometheus.GaugeValue, value(ready))
}

// value returns 1 if holds is true, and 0 otherwise.
func value(holds bool) float64 {
	if holds {
		return 1
	}
	return 0
}
