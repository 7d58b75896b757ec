def sub(p, *pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s, (p,a)
        s=s.replace(a,b)
    open(p,'w').write(s)
sub('sync/mirror/audit_test.go',
('''"2 web-2kim", "3 ?+")''','''"2 web-2kim", now+"?+")'''),
('''"2 web-2kim", "3 ?", "3 zoe")''','''"2 web-2kim", now+"?", now+"zoe")'''),
('''	m.at(head)
	m.noted(app, "1 ada", "1 web-1bob", "2 eve", "2 ", "2 web-2kim")
''','''	m.at(head)
	m.noted(app, "1 ada", "1 web-1bob", "2 eve", "2 ", "2 web-2kim")
	now := fmt.Sprintf("%d ", pastOf(t, store, app)[0].Generation) // it may have gone by the last commit for a moment
'''),
('''		{"of a node alone", list{stood(ada, 3, 0), stood(web1, 4, 0)}, list{web1}, list{stood(ada, 3, 10), stood(web1, 4, 0)}},''',
'''		{"of a node alone", list{stood(ada, 3, 0), stood(web1, 4, 0)}, list{web1},
			list{stood(ada, 3, 10), stood(web1, 4, 0)}},'''))
sub('sync/mirror/audit.go',('''// carryPins gives the entry of a new generation the pins that stood in the one before, and what became of them. Where the
// one before was not read, audit does so: when a pin began isn't known here.''','''// carryPins gives the entry of a new generation the pins that stood in the one before, and what became of them. Where
// the one before was not read, audit does so: when a pin began isn't known here.'''))
