package main

import (
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// registerProcess registers the metrics of every daemon: its version, Go's runtime and the process.
func registerProcess(r *prometheus.Registry) {
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "kedge_build_info", Help: "1, with the version that runs.",
		ConstLabels: prometheus.Labels{"version": version(), "goversion": runtime.Version()}})
	info.Set(1)
	r.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}
