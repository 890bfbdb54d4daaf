def write_report(plan):
    return ""
