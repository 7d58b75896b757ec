package fleet

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// Who asks why nothing starts, or whether it would tonight, is told of the windows without a rollout that meets them.
func TestFreezesToComeInWords(t *testing.T) {
	t.Parallel()
	type window = deployments.FreezeWindow
	weekend := window{Name: "weekend", Deny: "0 16 * * FRI", Duration: "64h", Reason: "nobody is there"}
	soon := window{Name: "audit", Deny: "0 15 * * TUE", Duration: "1h", Units: []string{"prod/*/*"}}
	other := window{Name: "db", Deny: "0 15 * * TUE", Duration: "1h", Units: []string{"prod/db/*"}}
	hours := window{Name: "hours", Allow: "0 9 * * MON-FRI", Duration: "8h"}
	never := window{Name: "leap", Allow: "0 0 29 2 MON", Duration: "1h"}
	april := window{Name: "april", Allow: "0 9 1 4 *", Duration: "8h"}
	nights := window{Name: "nights", Allow: "0 22 * * *", Duration: "2h"}
	always := window{Name: "always", Deny: "0 0 * * *", Duration: "24h", Reason: "moved"}
	year := window{Name: "2027", Deny: "* * 27-31,1-25 * *", Duration: "1h"}
	closed := window{Name: "daily", Allow: "0 0 * * *", Duration: "24h", Units: []string{"prod/db/*"}}
	of := func(w window, units ...string) window { w.Units = units; return w }
	frozen := &deployments.Progress{Phase: deployments.PhaseFrozen, Since: noon, Reason: deployments.ReasonFrozen}
	for name, c := range map[string]struct {
		windows []window
		at      time.Duration // after noon of a Tuesday
		rollout *deployments.Progress
		explain string
		status  string
	}{
		"none": {},
		"in some days": {windows: []window{weekend},
			explain: "no rollout starts from Fri 2026-11-27 16:00 UTC (in 3d) until " +
				"Mon 2026-11-30 08:00 UTC (in 5d): weekend; nobody is there"},
		"soon": {windows: []window{weekend, soon},
			explain: "no rollout starts from Tue 2026-11-24 15:00 UTC (in 3h) until Tue 2026-11-24 16:00 UTC (in 4h): audit",
			status:  "freeze  audit: no rollout starts from Tue 2026-11-24 15:00 UTC (in 3h), for prod/*/*\n"},
		"open": {windows: []window{soon}, at: 190 * time.Minute,
			explain: "no rollout starts now until Tue 2026-11-24 16:00 UTC (in 50m): audit",
			status:  "freeze  audit: no rollout starts until Tue 2026-11-24 16:00 UTC (in 50m), for prod/*/*\n"},
		"without an end": {windows: []window{always, closed},
			explain: "no rollout starts now, and no end is known: always; moved\n",
			status:  "freeze  always: no rollout starts, and no end is known\n"},
		"to come without an end": {windows: []window{year}, at: 48 * time.Hour,
			explain: "no rollout starts from Fri 2026-11-27 00:00 UTC (in 12h), and no end is known: 2027\n",
			status:  "freeze  2027: no rollout starts from Fri 2026-11-27 00:00 UTC (in 12h)\n"},
		"of another unit": {windows: []window{other},
			status: "freeze  db: no rollout starts from Tue 2026-11-24 15:00 UTC (in 3h), for prod/db/*\n"},
		"within what allows it": {windows: []window{hours},
			explain: "no rollout starts from Tue 2026-11-24 17:00 UTC (in 5h) until " +
				"Wed 2026-11-25 09:00 UTC (in 21h): hours, which is not open"},
		"outside of what allows it": {windows: []window{hours}, at: 6 * time.Hour,
			explain: "no rollout starts now until Wed 2026-11-25 09:00 UTC (in 15h): hours, which is not open",
			status:  "freeze  hours: is closed until Wed 2026-11-25 09:00 UTC (in 15h)\n"},
		"long before what allows it": {windows: []window{soon, soon, soon, april},
			explain: "no rollout starts now until Thu 2027-04-01 09:00 UTC (in 127d): april, which is not open",
			status:  "freeze  april: is closed until Thu 2027-04-01 09:00 UTC (in 127d)\n"},
		"beside what allows it": {windows: []window{april, hours},
			explain: "no rollout starts from Tue 2026-11-24 17:00 UTC"},
		"of units that others allow": {windows: []window{of(april, "prod/db/*", "prod/web/app"), of(hours, "*/web/*"),
			of(hours, "prod/*/*")}, explain: "no rollout starts from Tue 2026-11-24 17:00 UTC"},
		"beside what allows other units": {windows: []window{april, of(hours, "prod/db/*")},
			explain: "no rollout starts now until Thu 2027-04-01 09:00 UTC (in 127d): april, which is not open",
			status:  "freeze  april: is closed until Thu 2027-04-01 09:00 UTC (in 127d)\n"},
		"beside what allows some of its units": {windows: []window{of(april, "prod/*/*"), of(hours, "prod/web/*")},
			explain: "no rollout starts from Tue 2026-11-24 17:00 UTC",
			status:  "freeze  april: is closed until Thu 2027-04-01 09:00 UTC (in 127d), for prod/*/*\n"},
		"opens tonight beside what allows it": {windows: []window{hours, nights},
			explain: "no rollout starts from Tue 2026-11-24 17:00 UTC",
			status:  "freeze  nights: is closed until Tue 2026-11-24 22:00 UTC (in 10h), while others are open\n"},
		"open beside what is closed": {windows: []window{april, never, nights, soon}, at: 190 * time.Minute,
			explain: "no rollout starts now until Tue 2026-11-24 16:00 UTC (in 50m): audit",
			status: "freeze  audit: no rollout starts until Tue 2026-11-24 16:00 UTC (in 50m), for prod/*/*\n" +
				"        april: is closed until Thu 2027-04-01 09:00 UTC (in 127d)\n" +
				"        leap: is closed until Mon 2027-02-01 00:00 UTC (in 68d)\n        and 1 more"},
		"of every kind": {windows: []window{of(nights, "prod/web/*"), other, of(april, "prod/db/*"), weekend,
			of(hours, "prod/web/*"), {Name: "lunch", Deny: "0 12 * * *", Duration: "1h"}},
			explain: "no rollout starts now until Tue 2026-11-24 13:00 UTC (in 1h): lunch",
			status: "freeze  lunch: no rollout starts until Tue 2026-11-24 13:00 UTC (in 1h)\n" +
				"        april: is closed until Thu 2027-04-01 09:00 UTC (in 127d), for prod/db/*\n" +
				"        db: no rollout starts from Tue 2026-11-24 15:00 UTC (in 3h), for prod/db/*\n        and 1 more"},
		"its rollout says so": {windows: []window{soon}, at: 190 * time.Minute, rollout: frozen,
			status: "freeze  audit: no rollout starts until Tue 2026-11-24 16:00 UTC (in 50m), for prod/*/*\n"},
		"many": {windows: []window{soon, soon, soon, soon, soon},
			explain: "no rollout starts from Tue 2026-11-24 15:00 UTC (in 3h)",
			status:  "        and 2 more: kedge web lists them\n"},
		"hostile": {windows: []window{{Name: "a\x1b[2J\nb", Deny: soon.Deny, Duration: "1h"}, never},
			status: "freeze  leap: is closed until Mon 2027-02-01 00:00 UTC (in 68d)\n        a [2J b: no rollout starts from"},
	} {
		f := Assemble([]kv.Entry{
			put(kv.MirrorKey, deployments.MirrorState{Holder: "m", Head: "a", Freeze: c.windows}), lease(),
			put(kv.DesiredKey(app), deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 2,
				Rollout: c.rollout}),
			says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
		}, noon.Add(c.at))
		var table, chain bytes.Buffer
		if err := WriteTable(&table, f, TableOptions{}); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(table.String(), c.status) || (c.status == "") == strings.Contains(table.String(), "freeze") {
			t.Errorf("%s: status lacks %q:\n%s", name, c.status, table.String())
		}
		d, err := Explain(f, app, "web-1")
		if err != nil {
			t.Fatal(err)
		}
		if err := WriteExplain(&chain, f, app, "web-1", d, TableOptions{}); err != nil {
			t.Fatal(err)
		}
		says := "  freeze   " + c.explain
		if name != "hostile" && strings.Contains(chain.String(), says) != (c.explain != "") {
			t.Errorf("%s: explain lacks %q:\n%s", name, says, chain.String())
		}
	}
}
